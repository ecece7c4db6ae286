"""`fastreason distill`: a teacher's responses, verified, and what of them is worth training on."""
