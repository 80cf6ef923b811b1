"""Readers of networks in other programs' forms, one file each. What they return has passed `QGraph.check`."""
