"""Does an artifact still answer as its teacher does? Frozen samples, agreement with statistics, gates and reports.

Nothing in this package imports torch. ``agreement`` needs numpy alone and ``gate`` the standard library alone, so both
run unchanged on a device.
"""
