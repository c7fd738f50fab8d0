"""Robust training, its curve, the noise remedy and self-healing."""

import pytest
import torch

from prefvec_ray.common.errors import InputError, JobError
from prefvec_ray.robustness import Ball, Recipe, Remedy, train_classifier
from prefvec_ray.robustness.images import build_network, load_images
from prefvec_ray.robustness.threat import correct
from prefvec_ray.robustness.train import Moment, healed, shifted


def small(digits, **settings):
    torch.manual_seed(0)
    model = build_network("tiny", 1, 10)
    x, y = digits.train
    recipe = Recipe.model_validate({"epsilon": 0.1, "epochs": 3, "inner_steps": 2, "watch_every": 3, **settings})
    return model, train_classifier(model, (x[:300], y[:300]), digits.watch, recipe, seed=1)


@pytest.mark.parametrize("method", ["trades", "adversarial"])
def test_it_learns_and_says_what_happened(digits, method):
    model, curve = small(digits, method=method)
    assert correct(model, *digits.test).float().mean() > 0.5
    assert [moment.epoch for moment in curve] == [1, 2, 3]
    assert [moment.gap is not None for moment in curve] == [False, False, True]
    last = curve[-1]
    assert last.clean >= last.pgd >= last.strong
    assert last.gap_low <= last.gap <= last.gap_high
    assert (last.natural is None) == (method == "adversarial")
    assert 0 <= last.fosc_within <= last.fosc_relative <= 2
    again = small(digits, method=method)[1]
    assert again == curve, "the same seed gives the same curve"


@pytest.mark.parametrize(("threshold", "noisy"), [(0.0, [False, True, True]), (1e9, [False, False, False])])
def test_noise_comes_after_an_epoch_above_the_threshold_and_only_then(digits, threshold, noisy):
    curve = small(digits, remedy=Remedy(threshold=threshold, sigma=0.1))[1]
    assert [moment.noise for moment in curve] == noisy


def test_a_run_that_diverges_says_so(digits):
    with pytest.raises(JobError, match="lower the learning rate"):
        small(digits, lr=1e20)


def test_ball_and_recipe_must_agree(digits):
    with pytest.raises(InputError, match=r"the ball.s epsilon is 0\.2"):
        train_classifier(build_network("tiny", 1, 10), digits.train, digits.watch, Recipe(epsilon=0.1), ball=Ball(0.2))


def moment(epoch, pgd, strong, half=0.03):
    gap = pgd - strong
    flat = dict.fromkeys(("inner_max", "fosc", "fosc_relative", "fosc_within", "sgcs", "clean"), 0.0)
    return Moment(
        epoch=epoch, natural=None, noise=False, pgd=pgd, strong=strong, gap_low=gap - half, gap_high=gap + half, **flat
    )


def test_healing_needs_the_strong_accuracy_to_hold():
    bad, better, worse = moment(1, 0.5, 0.3), moment(2, 0.36, 0.34), moment(2, 0.22, 0.2)
    assert healed([bad, better])
    assert not healed([bad, worse]), "a gap that closes because nothing stands any more"
    assert not healed([bad]), "still overestimated"
    assert not healed([better]), "never was"


def test_images_are_split_once_and_checked(tmp_path):
    images = load_images("digits", 3)
    assert set(images.test[1].tolist()) == {0, 1, 2}
    assert 0 <= images.train[0].min() <= images.train[0].max() <= 1
    with pytest.raises(InputError, match="11 classes of digits: expected 2 to 10"):
        load_images("digits", 11)
    with pytest.raises(InputError, match="1 classes"):
        load_images("digits", 1)
    with pytest.raises(InputError, match="no such file"):
        load_images(str(tmp_path / "none.npz"), 10)
    with pytest.raises(InputError, match="fewer than"):
        load_images("digits", 2, test=400)


def test_pictures_are_shifted_and_mirrored_as_by_hand():
    images = torch.rand(20, 3, 6, 6)
    found = shifted(images, torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    mirrored, shifts = torch.rand(20, generator=draws) < 0.5, torch.randint(0, 9, (20, 2), generator=draws)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for i, (down, right) in enumerate(shifts.tolist()):
        part = padded[i, :, down : down + 6, right : right + 6]
        assert torch.equal(found[i], part.flip(2) if mirrored[i] else part)


def test_channels_last_changes_nothing_but_rounding():
    torch.manual_seed(0)
    network, x = build_network("narrow", 3, 10).eval(), torch.rand(4, 3, 32, 32)
    found = network(x)
    weight = network.get_parameter("body.embedder.embedder.convolution.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    usual = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    torch.testing.assert_close(usual(x), found, atol=1e-5, rtol=1e-4)


def test_merged_classes_keep_every_image():
    left_out, merged = (load_images("digits", 5, merge=merge) for merge in (False, True))
    assert len(merged.train[0]) > 1.5 * len(left_out.train[0])
    whole = load_images("digits", 10)
    assert len(merged.train[0]) == len(whole.train[0])
    assert torch.equal(merged.test[0], whole.test[0])
    assert torch.equal(merged.test[1], whole.test[1] // 2)


def test_folders_of_pictures(tmp_path):
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 100, (8, 8, 3)).astype("uint8") + (100 if name == "dog" else 0)
                Image.fromarray(pixels.astype("uint8")).save(tmp_path / part / name / f"{i}.jpg")
    images = load_images(str(tmp_path), 2, watch=4, test=6)
    assert images.train[0].shape == (8, 3, 8, 8)
    assert torch.equal(images.test[0].mean((1, 2, 3)) > 0.4, images.test[1] == 1), "dogs are bright"
    (tmp_path / "train" / "dog" / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"dog/broken.jpg: not a readable picture"):
        load_images(str(tmp_path), 2)
    Image.new("RGB", (9, 8)).save(tmp_path / "train" / "dog" / "broken.jpg")
    with pytest.raises(InputError, match=r"\(8, 9, 3\), others are \(8, 8, 3\); give one size"):
        load_images(str(tmp_path), 2)
    (tmp_path / "train" / "dog" / "broken.jpg").unlink()
    (tmp_path / "test" / "emu").mkdir()
    with pytest.raises(InputError, match="different classes: emu"):
        load_images(str(tmp_path), 2)
    with pytest.raises(InputError, match="expected train/CLASS/ and test/CLASS/"):
        load_images(str(tmp_path / "train"), 2)


def test_cifar_files_are_read_and_refused(tmp_path):
    import numpy as np

    path = tmp_path / "cifar.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)).astype("uint8")
    labels = np.arange(40) % 10
    np.savez(path, x_train=pictures, y_train=labels, x_test=pictures, y_test=labels)
    images = load_images(str(path), 10, watch=8, test=20)
    assert images.train[0].shape == (32, 3, 32, 32)
    for name in ("small", "narrow", "resnet18"):
        assert build_network(name, 3, 10)(images.train[0][:2]).shape == (2, 10)
    np.savez(path, x_train=pictures / 255, y_train=labels, x_test=pictures, y_test=labels)
    with pytest.raises(InputError, match="float64 of shape"):
        load_images(str(path), 10)
    np.savez(path, x_train=pictures, y_train=labels)
    with pytest.raises(InputError, match="has no x_test, y_test"):
        load_images(str(path), 10)
    path.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"cifar.npz: not a sound .npz file"):
        load_images(str(path), 10)
