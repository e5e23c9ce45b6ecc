"""Facts about the experiments: what a step costs by the compiler's own count, and that each of them can be run and drawn."""

import pytest

import experiments


def test_a_step_at_a_constant_rate_costs_at_most_2_2_forward_passes_and_a_cdat_step_1_7_of_those(optimized):
    forward = experiments.parts("mlp")["forward"].flops
    constant, cdat = (experiments.step_of("mlp", tuner)[0].flops for tuner in ("constant", "cdat"))
    assert 2 * forward < constant <= 2.2 * forward
    assert 1.3 * constant < cdat <= 1.7 * constant  # the forward pass is shared by gradient and curvature


@pytest.mark.parametrize("size", [256, 300])
def test_chunks_cost_5_percent_more_in_a_gradient_step_and_a_forward_pass_more_in_a_cdat_step(optimized, size):
    forward = experiments.parts("mlp")["forward"].flops
    chunk, trips = experiments.parts("mlp", samples=size), (2048 - 1) // size  # each beside the last, smaller chunk

    def flops(tuner, *bodies):  # the analysis counts the body of a loop once
        chunked = experiments.step_of("mlp", tuner, chunk_size=size)[0].flops
        return chunked + (trips - 1) * sum(chunk[body].flops for body in bodies)

    assert flops("constant", "gradient") <= 1.05 * experiments.step_of("mlp", "constant")[0].flops
    assert flops("cdat", "gradient", "curvature") <= experiments.step_of("mlp", "cdat")[0].flops + forward
