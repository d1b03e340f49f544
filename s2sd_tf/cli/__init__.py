"""The command-line programs; each is an absl binary."""
