"""The demo market: what `make run` finds there (`seed`), and who uses it while one watches (`traffic`)."""
