"""The commands: each parses its arguments, calls the part that does the work, and prints. Imports all of it lazily."""
