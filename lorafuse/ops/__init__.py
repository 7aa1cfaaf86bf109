"""The operators as torch sees them: one schema, one shape rule and one autograd.Function each."""
