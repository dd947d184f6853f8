"""Methods for one kind of layer: convolutions, quantised bases, heads, linears of several outputs."""
