"""Pictures and one HTML page, made from run directories alone: `build` for comparisons and single runs, `summary` for
the terminal.
"""
