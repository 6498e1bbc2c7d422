"""Figures show what the diagnosis says, look the same every time, and change nothing outside."""

import subprocess
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from drawn_reports import DEPTH, ONSET, PLANTED, make_report
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

from vitreg.diagnosis import figures as plots
from vitreg.diagnosis.photo_figures import patch_maps
from vitreg.plots.outlines import _edges
from vitreg.plots.style import number, number_ticks, percent, png, safe, short_name

FIGURES = {
    "norm_histograms": plots.norm_histograms,
    "layer_curves": plots.layer_curves,
    "position_map": plots.position_map,
    "photo_grid": plots.photo_grid,
    "overview": plots.overview,
    "photo_strip": lambda report: plots.photo_strip(report, 0),
    "emergence": lambda report: plots.emergence([("a", report), ("b", report)]),
}


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def line_at(ax, label: str) -> float:
    (line,) = [line for line in ax.lines if str(line.get_label()).startswith(label)]
    return line.get_xdata()[0]


@pytest.fixture(scope="module")
def found():
    report = make_report()
    assert (report.verdict, report.onset_layer, report.threshold is not None) == ("artifacts", ONSET, True)
    return report


@pytest.fixture(scope="module")
def clean():
    report = make_report(artifacts=False)
    assert report.verdict == "no artifacts"
    return report


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_the_same_every_time(name, found):
    first, second = (png(FIGURES[name](found), dpi=60) for _ in range(2))
    assert first[:4] == b"\x89PNG"
    assert first == second


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_of_a_model_without_artifacts(name, clean):
    assert png(FIGURES[name](clean), dpi=60)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_figures_of_wide_images_and_of_hostile_names(name):
    report = make_report(name="$x_1$ <b> \n\u202e日本 " + "long " * 40, wide=True)
    example = replace(report.examples[0], name="a/$\\frac{\n\x00\udc80.jpg")
    png(FIGURES[name](replace(report, examples=[example])), dpi=60)


def test_drawing_ignores_and_keeps_the_callers_settings(found):
    plain = png(plots.layer_curves(found), dpi=60)
    with matplotlib.rc_context({"axes.facecolor": "red", "xtick.color": "red", "savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        assert png(plots.layer_curves(found), dpi=60) == plain
        assert dict(matplotlib.rcParams) == before


@pytest.mark.slow
def test_plots_never_import_pyplot():
    modules = "sys, vitreg.diagnosis.figures, vitreg.reports.report"
    code = f"import {modules}; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class TestNorms:
    def test_histogram_has_the_threshold_and_the_median(self, found):
        above, below = plots.norm_histograms(found).axes[:2]
        layer = found.layers[found.detect_layer]
        assert line_at(below, "threshold") == found.threshold
        assert line_at(below, "median") == layer.median_norm
        assert line_at(below, "mean + 3 sigma") == found.mean_plus_3_sigma
        assert (below.get_xscale(), below.get_yscale(), above.get_xscale()) == ("log", "log", "log")
        assert below.get_title("left") == f"Norms after block {found.detect_layer}"

    def test_histogram_counts_every_token_once(self, found):
        below = plots.norm_histograms(found).axes[1]
        bars = {patch.get_label(): patch.get_data().values.sum() for patch in below.patches}
        outliers = found.images * len(PLANTED)
        assert bars == {"normal": found.images * 16 - outliers, "outliers": outliers}

    def test_heat_map_holds_all_layers(self, found):
        above = plots.norm_histograms(found).axes[0]
        (mesh,) = [item for item in above.collections if isinstance(item, QuadMesh)]
        assert mesh.get_array().sum(1).tolist() == [found.images * 16] * DEPTH
        marks = {item.get_label(): item.get_segments() for item in above.collections if item is not mesh}
        assert [x[0][0] for x in marks["median"]] == [layer.median_norm for layer in found.layers]
        assert [x[0][0] for x in marks["threshold"]] == [layer.threshold for layer in found.layers[ONSET:]]

    def test_without_artifacts_it_says_so(self, clean):
        figure = plots.norm_histograms(clean)
        assert "no second population" in texts(figure)
        assert "threshold" not in texts(figure)


class TestCurves:
    def test_curves_hold_the_layers_values(self, found):
        norms, fraction, attention = plots.layer_curves(found).axes
        drawn = {line.get_label(): list(line.get_ydata()) for line in norms.lines}
        assert drawn["median"] == [layer.median_norm for layer in found.layers]
        assert drawn["p99"] == [layer.p99_norm for layer in found.layers]
        assert drawn["max"] == [layer.max_norm for layer in found.layers]
        assert list(fraction.lines[0].get_ydata()) == [layer.outlier_fraction for layer in found.layers]
        heads = np.array([line.get_ydata() for line in attention.lines[:2]])
        assert heads.T.tolist() == [layer.attention_by_head for layer in found.layers]
        assert norms.get_yscale() == "log"

    def test_onset_and_detect_layers_are_marked(self, found):
        one = texts(plots.layer_curves(found))
        assert f"onset and detect layer {ONSET}" in one
        two = plots.layer_curves(replace(found, detect_layer=3))
        assert f"onset {ONSET}" in texts(two)
        assert "detect layer 3" in texts(two)
        for ax in two.axes:
            assert [line.get_xdata()[0] for line in ax.lines[-2:]] == [ONSET, 3]

    def test_without_artifacts_it_says_so(self, clean):
        assert "no outliers in any layer" in texts(plots.layer_curves(clean))


class TestPlaces:
    def test_map_holds_the_frequencies(self, found):
        ax = plots.position_map(found).axes[0]
        frequency = ax.images[0].get_array()
        assert frequency.tolist() == found.position_frequency
        assert [i for i, share in enumerate(frequency.flat) if share == 1] == list(PLANTED)
        assert (
            ax.get_title("left") == f"How often each place is an outlier (after block {found.detect_layer})"
        )

    def test_without_artifacts_it_says_so(self, clean):
        assert "no outliers at any place" in texts(plots.position_map(clean))


class TestPhotos:
    def test_photos_and_maps(self, found):
        figure = plots.photo_grid(found, "both", columns=2)
        images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
        assert len(images) == 3 * len(found.examples)
        first = found.examples[0]
        assert np.array_equal(images[0], first.photo)
        assert np.array_equal(images[2], first.norms[found.detect_layer])
        assert np.array_equal(images[4], first.attention[-1])

    def test_scales_are_shared_and_norms_logarithmic(self, found):
        norms, attention = patch_maps(found, "both", None)
        values = np.array([example.norms[found.detect_layer] for example in found.examples])
        assert (norms.scale.vmin, norms.scale.vmax) == (values.min(), values.max())
        assert norms.scale(np.sqrt(values.min() * values.max())) == pytest.approx(0.5, abs=1e-3)
        assert attention.scale.vmin == 0

    def test_patches_are_flat_squares_on_the_photo(self):
        report = make_report(wide=True)
        for ax in plots.photo_grid(report).axes:
            for image in ax.images:
                assert image.get_extent() == [0, 64, 32, 0] or image.axes.get_label() == "<colorbar>"
        maps = [i for ax in plots.photo_grid(report).axes for i in ax.images if i.get_array().shape == (4, 8)]
        assert {image.get_interpolation() for image in maps} == {"nearest"}

    def test_outliers_are_outlined(self, found):
        tall = replace(found.examples[0], photo=np.zeros((64, 32, 3), np.uint8))  # patches of 16 x 8 pixels
        ax = plots.photo_strip(replace(found, examples=[tall]), 0).axes[1]
        (outline,) = [item for item in ax.collections if isinstance(item, LineCollection)]
        corners = {tuple(point) for line in outline.get_segments() for point in line.tolist()}
        first, second = {(0, 0), (8, 0), (0, 16), (8, 16)}, {(24, 16), (32, 16), (24, 32), (32, 32)}
        assert corners == first | second

    def test_nothing_is_outlined_without_artifacts(self, clean):
        axes = plots.photo_strip(clean, 0).axes
        assert not [x for ax in axes[:2] for x in ax.collections if isinstance(x, LineCollection)]

    def test_layer_can_be_chosen(self, found):
        assert "L2 norm after block 1" in texts(plots.photo_grid(found, "norms", layer=1))
        assert "CLS attention, block 1" in texts(plots.photo_grid(found, "attention", layer=1))
        with pytest.raises(ValueError, match="found layer 4, but the model has layers 0 to 3"):
            plots.photo_grid(found, "norms", layer=4)

    def test_without_examples_it_says_so(self):
        report = make_report(examples=0)
        assert "no example photos were kept" in texts(plots.overview(report))


def test_edges_surround_a_shape_and_not_its_inside():
    mask = np.zeros((3, 3), dtype=bool)
    mask[1, 1:] = True
    edges = {tuple(edge) for edge in _edges(mask)}
    above, below = {((1, 1), (2, 1)), ((2, 1), (3, 1))}, {((1, 2), (2, 2)), ((2, 2), (3, 2))}
    assert edges == above | below | {((1, 1), (1, 2)), ((3, 1), (3, 2))}


class TestOverview:
    def test_title_states_model_and_verdict(self, found, clean):
        assert "tiny: artifacts\n" in texts(found.figure())  # the overview is a diagnosis' main figure
        without = texts(plots.overview(clean))
        assert "tiny: no artifacts\n" in without
        assert clean.reason[:60] in without

    def test_other_kinds_are_named_where_there_are_some(self, clean):
        sinks = replace(clean.kind("attention sinks"), present=True)
        assert "Other artifacts" not in texts(plots.overview(clean))
        assert clean.other_artifacts == ()
        others = replace(clean, kinds=(sinks,))
        assert "Other artifacts: attention sinks of ordinary norm." in texts(plots.overview(others)).replace(
            "\n", " "
        )
        assert others.other_artifacts == (others.kind("attention sinks"),)
        with pytest.raises(KeyError, match="Expected one of attention sinks"):
            others.kind("locality")

    @pytest.mark.parametrize("name", FIGURES)
    def test_a_phantom_is_called_one_everywhere(self, name, found):
        assert "phantom" in texts(FIGURES[name](replace(found, planted=True)))

    def test_a_real_model_is_not_called_a_phantom(self, found):
        assert "phantom" not in texts(plots.layer_curves(found))

    def test_no_text_leaves_the_figure(self, found):
        report = replace(found, planted=True, model="a-very-long-name-" * 10, reason="word " * 60)
        figure = plots.overview(report)
        figure.draw_without_rendering()
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text().strip():
                box = text.get_window_extent()
                assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, text.get_text()


class TestEmergence:
    def test_lines_and_cells(self, found, clean):
        above, below = plots.emergence([("1k", clean), ("2k", found)]).axes[:2]
        assert list(above.lines[0].get_ydata()) == [0, found.outlier_fraction]
        columns = [x.get_array() for x in below.collections if isinstance(x, QuadMesh)]
        assert columns[0].mask.all()
        assert columns[1].filled(0).ravel().tolist() == [x.outlier_fraction for x in found.layers]
        assert [tick.get_text() for tick in below.get_xticklabels()] == ["1k", "2k"]
        assert below.get_ylabel() == "layer (0-based)"

    def test_different_depths_share_the_relative_depth(self, found):
        deeper = make_report(depth=6)
        below = plots.emergence([("S", found), ("L", deeper)]).axes[1]
        columns = [x for x in below.collections if isinstance(x, QuadMesh)]
        assert [x.get_array().shape[0] for x in columns] == [DEPTH, 6]
        assert {(x.get_coordinates()[..., 1].min(), x.get_coordinates()[..., 1].max()) for x in columns} == {
            (0, 1)
        }
        assert below.get_ylabel() == "relative depth"

    def test_many_labels_are_thinned_out(self, found):
        below = plots.emergence([(str(step), found) for step in range(60)]).axes[1]
        assert [tick.get_text() for tick in below.get_xticklabels()] == [
            str(step) for step in range(0, 60, 3)
        ]

    def test_nothing_to_draw_is_an_error(self):
        with pytest.raises(ValueError, match="found no report"):
            plots.emergence([])


class TestStyle:
    @pytest.mark.parametrize(("low", "high"), [(4, 800), (5, 9.5), (11, 11.5), (1, 2), (1e-3, 1e5), (16, 42)])
    def test_any_range_has_some_ticks_and_not_too_many(self, low, high):
        ticks, words = number_ticks(low, high)
        assert 2 <= len(ticks) <= 9
        assert all(low <= tick <= high for tick in ticks)
        assert len(set(words)) == len(words)

    def test_numbers(self):
        assert [number(x) for x in (0.5, 12.04, 1234.5, 1e7, 1e-4, 0)] == [
            "0.5",
            "12",
            "1,234",
            "1e+07",
            "0.0001",
            "0",
        ]
        assert [percent(x) for x in (0, 0.02, 0.2914, 1, 0.00012)] == [
            "0%",
            "2.00%",
            "29.1%",
            "100%",
            "0.0120%",
        ]

    def test_safe_text(self):
        assert safe("a\n日\u202e\udc80é") == "a\ufffd\ufffd\ufffd\ufffdé"
        assert safe("abcdefghij", 5) == "ab…ij"

    @pytest.mark.parametrize(
        ("name", "short"),
        [
            ("/models/vit/", "vit"),
            ("C:\\models\\vit", "vit"),
            ("timm:hf-hub:a/b", "timm:hf-hub:a/b"),
            ("phantom of /models/vit", "vit"),
            ("VisionTransformer", "VisionTransformer"),
        ],
    )
    def test_short_names(self, name, short):
        assert short_name(name) == short
