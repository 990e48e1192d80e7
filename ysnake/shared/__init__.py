"""What every room uses: errors, the command line, the terminal, files on disk."""
