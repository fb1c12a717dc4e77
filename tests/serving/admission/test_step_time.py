import pytest
from tomoe_serving.admission.step_time import Profile, StepTimes, interpolate, limits_for, rising

TIMES = StepTimes(decode=((1, 10.0), (2, 12.0), (4, 16.0), (8, 24.0)), prefill=((1, 10.0), (16, 25.0), (64, 73.0)))


@pytest.mark.parametrize(("size", "ms"), [(1, 10), (3, 14), (8, 24), (12, 32), (0.5, 10)])
def test_curve_is_linear_between_points_and_keeps_its_last_slope(size, ms):
    assert interpolate(TIMES.decode, size) == pytest.approx(ms)


def test_one_point_grows_with_the_size():
    assert interpolate(((4, 10.0),), 8) == pytest.approx(20)
    assert interpolate(((4, 10.0),), 2) == pytest.approx(10)


def test_noise_never_makes_a_larger_size_faster():
    assert rising([(2, 5.0), (1, 7.0), (4, 6.0)]) == ((1, 7.0), (2, 7.0), (4, 7.0))


def test_limits_keep_decoding_within_the_slo():
    limits = limits_for(TIMES, 20, max_sequences=64, max_step_tokens=64)
    assert limits.max_sequences == 6
    assert interpolate(TIMES.decode, 6) <= 20 < interpolate(TIMES.decode, 7)
    assert limits.max_step_tokens >= max(16, limits.max_sequences)
    assert interpolate(TIMES.prefill, limits.max_step_tokens) <= 2 * 20


def test_limits_do_not_exceed_those_of_the_engine():
    limits = limits_for(TIMES, 1000, max_sequences=5, max_step_tokens=32)
    assert (limits.max_sequences, limits.max_step_tokens) == (5, 32)


def test_slo_that_one_stream_exceeds_is_refused():
    with pytest.raises(ValueError, match=r"a single stream takes 10\.0 ms"):
        limits_for(TIMES, 9, max_sequences=8, max_step_tokens=64)


def test_context_adds_to_the_step_time():
    times = StepTimes(TIMES.decode, TIMES.prefill, kv_ms_per_token=0.01)
    assert times.decode_ms(2, 1000) == pytest.approx(12 + 10)


def test_tokens_per_second():
    assert TIMES.tokens_per_s(8) == pytest.approx(8 / 0.024)


def test_profile_is_read_as_written(tmp_path):
    file = tmp_path / "new" / "profile.json"
    profile = Profile({"vllm": "1", "engine_args": ["-O0"]}, TIMES)
    profile.write(file)
    assert Profile.read(file) == profile
    profile.require({"vllm": "1"}, file)
    with pytest.raises(ValueError, match="measured with vllm '1', but it is '2' now"):
        profile.require({"vllm": "2"}, file)


@pytest.mark.parametrize("text", ["", "{}", '{"key": {}, "decode": [], "prefill": [[1, 2]], "kv_ms_per_token": 0}'])
def test_invalid_profile_is_refused(tmp_path, text):
    file = tmp_path / "profile.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="not a step-time profile"):
        Profile.read(file)
