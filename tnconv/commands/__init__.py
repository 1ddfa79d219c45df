"""What the command line does: layers as diagrams, accounts of programs, reports, measurements."""
