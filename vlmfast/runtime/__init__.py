"""The only place that hooks a transformers model: columns, tower, layers, attention, meter, stepper."""
