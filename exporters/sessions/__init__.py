"""Sessions: a loaded artifact behind one verb, ``run(images) -> logits``."""
