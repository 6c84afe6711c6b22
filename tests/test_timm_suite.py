"""timm's own model tests, out of the sdist of the installed timm, on every model of this package."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import timm
import timm_suite
import torch

Failures = dict[str, list[str]]


@pytest.fixture(scope='module')
def failures(tmp_path_factory: pytest.TempPathFactory) -> Failures:
    """Names and tracebacks of the failed tests, by model."""
    folder = tmp_path_factory.mktemp('timm')
    report = folder / 'report.xml'
    try:
        code = timm_suite.run(folder, timm_suite.MODELS, '--quiet', f'--junitxml={report}')
    except timm_suite.SdistUnavailableError as error:
        pytest.skip(str(error))
    assert code in (0, 1), f'pytest could not run the tests of timm, exit code {code}; see its output'
    return by_model(report)


def by_model(report: Path) -> Failures:
    found: Failures = {model: [] for model in timm_suite.MODELS}
    for case in ElementTree.parse(report).iter('testcase'):
        name = case.attrib['name']  # test_model_forward[1-ait_base]
        model = next(model for model in name.rstrip(']').split('[')[1].replace('.', '-').split('-') if model in found)
        found[model] += [f'{name}\n{fault.text}' for tag in ('failure', 'error') for fault in case.iter(tag)]
    return found


@pytest.mark.timeout(3000)
@pytest.mark.parametrize('model', timm_suite.MODELS)
def test_a_model_passes_what_timm_asks_of_a_vit(model: str, failures: Failures) -> None:
    assert not failures[model], '\n\n'.join(failures[model])


@pytest.mark.parametrize('model', timm_suite.TWO_LEVELS)
def test_two_blocks_give_two_levels(model: str) -> None:
    """What timm's test of the intermediates would go on to ask of a model that has fewer than its three levels."""
    net = timm.create_model(model).eval()
    x = torch.randn(2, *net.pretrained_cfg['input_size'])
    grid = net.patch_embed.grid_size
    with torch.no_grad():
        output, levels = net.forward_intermediates(x)
        assert [level.shape for level in levels] == [(2, info['num_chs'], *grid) for info in net.feature_info]
        assert len(levels) == 2
        torch.testing.assert_close(output, net.forward_features(x), rtol=1e-5, atol=1e-8)
    net.set_grad_checkpointing()
    torch.testing.assert_close(net.forward_intermediates(x)[0].detach(), output, rtol=1e-4, atol=1e-5)


def test_a_list_that_timm_has_moved_is_an_error() -> None:
    source = "NON_STD_FILTERS = [\n    'vit_*',\n]\nFEAT_INTER_FILTERS = [\n    'beit',\n]\n"
    assert "NON_STD_FILTERS = ['ait_*', 'test_ait', \n    'vit_*'" in timm_suite.add_names(source)
    with pytest.raises(ValueError, match=r'expected "FEAT_INTER_FILTERS = \[" once .* got 0'):
        timm_suite.add_names(source.replace('FEAT_INTER_FILTERS', 'FEATURES'))


def test_an_sdist_that_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timm_suite, 'CACHE', tmp_path)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
    with pytest.raises(timm_suite.SdistUnavailableError, match=r'no sdist of timm 0\.0\.1: pip found none'):
        timm_suite.fetch_sdist('0.0.1')
