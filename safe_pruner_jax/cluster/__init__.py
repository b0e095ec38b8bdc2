"""Past one machine: evaluation and serving on Ray (extra `ray`), which places what `evaluation` and `serving` hold."""
