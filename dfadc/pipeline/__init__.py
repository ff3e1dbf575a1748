"""Pipeline stages, one file each, named like their commands."""

from dfadc.package_check import check_exporters_package

check_exporters_package()  # before a stage imports a foreign package of that name, for callers from Python
