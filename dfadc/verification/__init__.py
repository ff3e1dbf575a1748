"""Agreement with statistics, gates and verdicts; needs numpy alone, and a device kit copies this folder whole."""
