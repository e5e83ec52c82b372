"""What the validity gate finds: faults planted in a model, the checks that find each, and what the checks cost."""
