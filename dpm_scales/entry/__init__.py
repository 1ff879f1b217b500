"""The commands as programs: `dpm-scales COMMAND` and the scripts of a checkout, one module for each command."""
