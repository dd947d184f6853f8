"""Methods for convolutions, quantised bases and linears of several outputs."""
