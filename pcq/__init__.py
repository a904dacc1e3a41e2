"""pcq: pretrained networks made tiny without breaking them."""
