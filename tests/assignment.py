"""Hand the project out as exercises: a copy in which chosen functions have a docstring and no body.

    python tests/assignment.py --list                               # the exercises, and the scripts that hold them
    python tests/assignment.py --out handout                        # a handout with all of them
    python tests/assignment.py --out handout add_noise dce_loss     # or with these
    python -m pytest handout/tests -k add_noise                     # judges one, in a handout or in the project

An exercise is a function or method of a script with the line `# exercise` above it. A function that several scripts
share is taken out of all of them; the tests judge the first, and that the others have the same text or none yet. The
originals stay where they are, which makes them the solution; handout.json says what was taken out.
"""
import argparse
import ast
import functools
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / f"{name}.py" for name in ("protodiffusion", "pdm", "patronus") if (ROOT / f"{name}.py").exists()]
COPIED = ("protodiffusion.py", "pdm.py", "patronus.py", "tutorial.ipynb", "README.md", "LICENSE", "requirements.txt",
          "pytest.ini", ".gitignore", "assets/*.png", "tests/*.py")

# Name: what to look at when a test fails, and the tests that judge it, which need no other exercise unless it says so.
EXERCISES = {
    "add_noise": ("sqrt(abar) weighs the image, sqrt(1 - abar) the noise; each image has its own t: abar[t] is [B]",
        "test_noised_images_have_the_mean_and_spread_of_the_forward_process",
        "test_every_image_is_noised_at_its_own_level"),
    "noise_loss": ("model(xt, t, condition); a mean over images, channels and pixels. It needs add_noise",
        "test_noise_loss_is_the_mean_squared_error_over_all_elements"),
    "guided_noise": ("w = 0 is the conditional model: weights 1 + w and -w; one call with 2 B images, B if w = 0",
        "test_guidance_extrapolates_from_null_to_class_in_one_doubled_batch",
        "test_no_guidance_is_one_call_of_the_plain_batch"),
    "ddim_step": ("the variance that sigma takes from the predicted noise comes back as noise; a, a_next are abar",
        "test_ddim_step_weighs_image_prediction_and_noise", "test_ddpm_step_is_ddim_step_at_eta_one"),
    "dpmpp_step": ("lambda grows towards the image: mind the signs; the first and the last step are of first order",
        "test_first_dpmpp_step_is_ddim_and_the_second_uses_the_step_before"),
    "frechet_distance": ("S1 and S2 do not commute; without full rank, rounding makes eigenvalues negative",
        "test_frechet_distance_of_known_gaussians", "test_frechet_distance_where_covariances_do_not_commute",
        "test_frechet_distance_is_zero_for_equals_even_if_rank_deficient"),
    "dce_loss": ("one softmax over all C K prototypes, then sums within classes; in logarithms, or 900 overflows",
        "test_dce_loss_by_hand_sums_the_prototypes_of_a_class",
        "test_dce_gradient_is_the_softmax_minus_the_share_within_the_class"),
    "prototype_loss": ("of the own class alone, and of its K prototypes only the nearest; d is squared already",
        "test_prototype_loss_pulls_only_the_nearest_prototype_of_the_own_class"),
    "contrastive_loss": ("near is likely, so distances enter with a minus; tau sharpens",
        "test_contrastive_loss_is_the_cross_entropy_of_negative_distances",
        "test_contrastive_gradient_draws_z_to_its_prototype_and_pushes_the_others"),
    "alignment_loss": ("mean over B and D, not sum; nothing is detached, so features and prototypes both move",
        "test_alignment_loss_is_a_mean_over_elements_that_moves_features_and_prototypes"),
    "compactness_loss": ("cosines: no lengths; squared: opposite is as bad as equal; each pair twice, no diagonal",
        "test_compactness_loss_is_the_sum_of_squared_cosines_off_the_diagonal",
        "test_compactness_gradient_turns_prototypes_apart"),
    "balanced_assignment": ("in a round columns come first and rows last; three rounds, or as many as are asked for",
        "test_a_balanced_assignment_scales_columns_and_then_rows_three_times",
        "test_in_the_limit_prototypes_receive_equal_shares_and_sums_with_rows_or_columns_change_nothing"),
    "swapped_loss": ("q of each other view; in_all_processes: own rows begin at RANK * B. It needs balanced_assignment",
        "test_each_view_predicts_what_is_assigned_to_the_others",
        "test_the_second_of_two_processes_assigns_the_images_of_both_and_learns_from_its_own"),
    "PrototypeAttention.forward": ("softmax over the n tokens, not the pixels; heads are slices of C / heads channels",
        "test_one_key_adds_the_same_vector_at_every_pixel_whatever_they_hold",
        "test_one_key_gives_the_queries_no_gradient",
        "test_several_keys_are_a_plain_softmax_and_differ_from_pixel_to_pixel",
        "test_the_bias_raises_the_weight_of_the_chosen_key"),
    "PDM.learn": ("nearest to the clean image, or label; s-PDM: no compactness; count once, then p. It needs losses",
        "test_pdm_chooses_the_nearest_prototype_and_s_pdm_the_labels",
        "test_learn_gives_the_losses_of_the_choice_with_its_sharpness",
        "test_with_two_views_directions_count_the_clean_image_chooses_and_all_three_are_swapped",
        "test_learn_stays_in_float32_under_mixed_precision", "test_statistics_by_hand",
        "test_usage_is_a_moving_average_of_the_choices_in_training_and_of_no_others"),
    "receptive_field": ("kernel and padding count in steps of the layers before; strides multiply later steps",
        "test_receptive_field_of_padded_layers_by_hand", "test_every_patch_is_where_the_gradient_is_and_inside_the_image"),
    "patch_distances": ("squared, for each patch and prototype: [B, m, h, w]; at least 0; float32 under autocast",
        "test_patch_distances_by_an_explicit_loop",
        "test_patch_distances_are_never_negative_and_float32_under_autocast"),
    "activation": ("large where the distance is small: 9.2 at d = 0; d is squared already",
        "test_activation_by_hand"),
    "invert": ("from the clean image, abar = 1, to the noisiest level; the network is told the t of the current x",
        "test_inversion_at_one_step_and_the_order_of_levels"),
    "auroc": ("ties count half; only the order of the scores matters; NaN if one kind is missing",
        "test_auroc_by_hand", "test_auroc_by_counting_pairs"),
    "spherical": ("the angle between two vectors as long as the image has numbers; do not divide by almost 0",
        "test_spherical_interpolation_by_hand", "test_spherical_interpolation_between_parallel_noise_is_linear"),
    "choose_movers": ("0.1 tells a trait as well as 0.9; the n best for b go first, then the n best for a of the rest",
        "test_movers_are_the_best_for_a_without_the_best_for_b"),
}

class Stop(Exception):
    """What only the person at the keyboard can put right: one sentence, and exit status 2."""

@functools.cache
def functions(text):
    """Functions by name and methods as Class.method of a script's text -> name: ast node."""
    body = ast.parse(text).body
    found = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    return found | {f"{c.name}.{node.name}": node for c in body if isinstance(c, ast.ClassDef)
                    for node in c.body if isinstance(node, ast.FunctionDef)}

def marked(text):
    """The functions with the mark above their def and its decorators -> name: ast node, in the script's order."""
    lines = text.split("\n")
    return {name: node for name, node in functions(text).items()
            if lines[min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 2].strip() == "# exercise"}

def places():
    """Where the exercises are -> name: [(script, line of the def, first line of the docstring)]."""
    found = {}
    for path in SCRIPTS:
        for name, node in marked(path.read_text(encoding="utf-8")).items():
            found.setdefault(name, []).append((path.name, node.lineno, (ast.get_docstring(node) or "").split("\n")[0]))
    return found

def without_bodies(text, names):
    """A script's text in which nothing but the docstring is left of the exercises `names`."""
    lines = text.split("\n")
    for name, node in sorted(marked(text).items(), key=lambda item: -item[1].lineno):    # from the end: lines stay put
        docstring = node.body[0]
        stub = f'raise NotImplementedError("{name} is an exercise: pytest tests -k {name}")'
        if name in names:
            lines[docstring.end_lineno:node.end_lineno] = [" " * docstring.col_offset + stub]
    return "\n".join(lines)

def taken_out(root):
    """The names of the exercises that were taken out of the project in the folder `root`; none if it is no handout."""
    path = Path(root) / "handout.json"
    return set(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else set()

def hand_out(out, names):
    """Copy the project into the folder `out`, without the bodies of the exercises `names`. Stop if it is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Stop(f"{out} is there already: choose a folder that is new or empty")
    for path in sorted(path for pattern in COPIED for path in ROOT.glob(pattern) if path.name != "test_assignment.py"):
        copy = out / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        if path in SCRIPTS:
            copy.write_text(without_bodies(path.read_text(encoding="utf-8"), names), encoding="utf-8", newline="\n")
    content = {name: [script for script, *_ in held] for name, held in places().items() if name in names}
    (out / "handout.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

def main(argv=None):
    """The command line. Returns the exit status: 0; 2 for what one sentence explains."""
    parser = argparse.ArgumentParser(prog="python tests/assignment.py", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="exercises to take out; none: all")
    parser.add_argument("--out", type=Path, help="the handout's folder, new or empty")
    parser.add_argument("--list", action="store_true", help="print the exercises")
    given = parser.parse_args(argv)
    try:
        if taken_out(ROOT):
            raise Stop(f"{ROOT} is a handout itself: make another from the project that it was made from")
        known = places()
        if given.list:
            for name, held in known.items():
                print(f"{name:27}{', '.join(script for script, *_ in held)}\n{'':27}{held[0][2]}")
            return 0
        for name in given.names:
            if name not in known:
                raise Stop(f"there is no exercise '{name}': choose of {', '.join(known)}")
        if not given.out:
            raise Stop("say with --out where the handout shall lie, or ask for --list")
        names = given.names or list(known)
        hand_out(given.out, names)
        print(f"{given.out}: {len(names)} exercises, listed in handout.json; one is judged by: "
              f"python -m pytest {given.out / 'tests'} -k {names[0]}")
        return 0
    except (Stop, OSError) as error:
        print(f"assignment: {error}", file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
