"""mIoU and its relatives, against scikit-learn's confusion matrix and by hand."""
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from simsiam_models.benchmarks.segmentation.metrics import compute_metrics, count_pixels

CLASSES = 6


@pytest.fixture(scope='module')
def labels() -> tuple[np.ndarray, np.ndarray]:
    """Truth with ignored pixels and without class 4; predictions without class 5, and with unknown ones."""
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 3, 5, 255], (40, 50), p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]).astype(np.uint8)
    predicted = np.where(rng.random((40, 50)) < 0.6, truth, rng.choice([0, 1, 2, 3, 4, 9, 200], (40, 50)))
    return truth, np.where(predicted == 5, 0, predicted).astype(np.uint8)


def test_counts_are_scikit_learns_confusion_matrix_without_ignored_pixels(labels):
    truth, predicted = labels
    valid = truth != 255
    known = np.where(predicted < CLASSES, predicted, CLASSES)
    expected = confusion_matrix(truth[valid], known[valid], labels=range(CLASSES + 1))[:CLASSES]
    assert np.array_equal(count_pixels(truth, predicted, CLASSES), expected)


def test_iou_is_scikit_learns_and_a_class_that_is_nowhere_is_left_out_of_the_mean(labels):
    truth, predicted = labels
    valid = truth != 255
    counts = count_pixels(truth, np.where(predicted == 4, 0, predicted), CLASSES)  # 4 is neither true nor predicted
    metrics, rows = compute_metrics(counts, list('abcdef'))
    present = [0, 1, 2, 3, 5]
    known = np.where(predicted == 4, 0, predicted)[valid]
    expected = 100 * jaccard_score(truth[valid], known, labels=present, average=None)
    assert [rows[i]['IoU'] for i in present] == pytest.approx(expected.tolist())
    assert rows[4]['IoU'] is None and rows[4]['accuracy'] is None and rows[4]['pixels'] == 0
    assert metrics['mIoU'] == pytest.approx(expected.mean())
    assert metrics['pixel_accuracy'] == pytest.approx(100 * (truth[valid] == known).mean())


def test_a_class_that_is_predicted_but_never_true_counts_with_zero(labels):
    truth, predicted = labels
    metrics, rows = compute_metrics(count_pixels(truth, predicted, CLASSES), list('abcdef'))
    assert rows[4]['IoU'] == 0 and rows[4]['accuracy'] is None
    assert metrics['mIoU'] == pytest.approx(np.mean([row['IoU'] for row in rows]))
    assert metrics['mAcc'] == pytest.approx(np.mean([row['accuracy'] for row in rows if row['accuracy'] is not None]))


def test_an_unknown_prediction_adds_to_the_union_of_the_true_class_alone():
    truth, predicted = np.array([[0, 0, 0, 1]]), np.array([[0, 0, 7, 1]])
    metrics, rows = compute_metrics(count_pixels(truth, predicted, 2), ['a', 'b'])
    assert [row['IoU'] for row in rows] == pytest.approx([100 * 2 / 3, 100]) and metrics['pixel_accuracy'] == 75


def test_counts_of_images_add_up():
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 3, (2, 4, 8, 8))
    parts = sum(count_pixels(t, p, 3) for t, p in zip(truth, predicted, strict=True))
    assert np.array_equal(parts, count_pixels(truth, predicted, 3))


def test_true_labels_of_no_class_and_other_shapes_are_refused():
    with pytest.raises(ValueError, match='true labels 0 to 3, but the classes are 0 to 2'):
        count_pixels(np.array([0, 3]), np.array([0, 0]), 3)
    with pytest.raises(ValueError, match='shapes must be the same'):
        count_pixels(np.zeros((2, 2), int), np.zeros((2, 3), int), 3)


def test_masks_without_a_label_have_no_metric():
    with pytest.raises(ValueError, match='no pixel of the test images has a label'):
        compute_metrics(count_pixels(np.full((2, 2), 255), np.zeros((2, 2), int), 3), list('abc'))
