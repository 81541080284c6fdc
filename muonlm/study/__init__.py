"""Small experiments on trained runs, one file per claim about Muon, each with its measurement and its verdict."""
