"""Detection: a detector is trained on annotated objects and measured by average precision."""
