"""The torch side: the layer and the surgery that puts it into a model."""
