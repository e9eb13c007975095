"""Errors, files, terminals and the command line: no physics, no model."""
