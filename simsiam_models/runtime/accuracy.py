"""How uncertain accuracies are: standard errors by the binomial formula."""
import math


def standard_error(accuracy: float, images: int) -> float:
    """Returns the standard error of an accuracy on `images` test images, both in percent."""
    p = min(1.0, max(0.0, accuracy / 100))
    return 100 * math.sqrt(p * (1 - p) / images)


def difference_error(a: float, b: float, images: int) -> float:
    """Returns the standard error of a - b, two accuracies in percent on `images` test images each."""
    return math.hypot(standard_error(a, images), standard_error(b, images))
