"""Ratios against named peers, measured side by side in one run: what `muonlm bench` prints."""
