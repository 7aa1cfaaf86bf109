"""What `lorafuse bench` is made of: one module per kind, the baselines' loader, timing across processes, reports."""
