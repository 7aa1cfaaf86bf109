"""What `lorafuse demo` is made of: `data`, `model`, `quantized`, `train`, `report`."""
