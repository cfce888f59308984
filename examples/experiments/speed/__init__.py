"""What steps, products, convolutions, the quantizer and the import cost."""
