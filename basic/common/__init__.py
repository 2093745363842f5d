"""Files, errors, configuration, command line and progress bars, for every package."""
