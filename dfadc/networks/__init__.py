"""Networks of any origin, constructed by name, saved, adapted and counted, whether teacher or student."""
