"""Closed-loop evaluation: policies driven in a simulator, one module per simulator."""
