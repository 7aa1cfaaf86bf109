"""What `lorafuse demo` is made of: `data`, `model`, `train`, `report`."""
