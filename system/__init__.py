"""What a program has to do with the system: signals, failures of processes, and errors in plain words."""
