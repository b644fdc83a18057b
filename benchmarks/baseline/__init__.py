"""Plain formulations of what the published code computes, to measure against; checked against golden values in tests."""
