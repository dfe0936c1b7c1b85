"""What a program has to do with the system: failures of processes, and errors in plain words."""
