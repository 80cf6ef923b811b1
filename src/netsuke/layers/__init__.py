"""Linear maps: each knows `bytes()`, `macs()` and `to_dense()`."""
