"""What all other folders use: errors, the command line, the terminal, files on disk."""
