"""`fastreason eval`: benchmarks, sampled and scored; and `fastreason regrade`."""
