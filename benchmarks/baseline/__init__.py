"""What the figures are measured against: plain formulations of the published arithmetic, checked against its numbers."""
