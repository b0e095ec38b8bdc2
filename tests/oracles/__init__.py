"""Independent references: float64 loops written from the papers and from openpi, which tests compare with."""
