"""Numbers recorded before the scripts were rewritten: what they compute has stayed the same."""
import pytest
import torch
from torch import nn

import protodiffusion as pd
from conftest import CPU, normal, seeded

# x[0, 0, 0, :], mean and standard deviation of what 7 steps make of one noise with one analytic noise predictor.
SAMPLES = {
    ("ddim", True): [-0.8023278, -0.8182404, -0.1548132, -0.2107867, -0.1553062, 0.4540664],
    ("ddim", False): [-1.186582, -1.192443, -0.5031732, -0.7369464, -0.4812666, 0.5453059],
    ("ddpm", True): [-0.2680574, -0.1885546, 0.2889943, -0.6047843, -0.1043516, 0.3222961],
    ("ddpm", False): [-0.3051884, -0.2858177, 0.2241929, -0.7686052, -0.1473101, 0.3514436],
    ("dpmpp", True): [-0.7658269, -0.784021, -0.1310489, -0.1863981, -0.1059416, 0.4766435],
    ("dpmpp", False): [-0.9457859, -0.9508469, -0.1241929, -0.2011487, -0.1528578, 0.5243685]}

def near(found, recorded, rel=1e-4):
    assert torch.as_tensor(found).flatten().tolist() == pytest.approx(recorded, rel=rel, abs=1e-6)

@pytest.mark.parametrize("sampler, clip", SAMPLES)
def test_samplers(sampler, clip):
    x = pd.sample(lambda x, t: 0.98 * x + 0.1 * torch.sin(3 * x) + t[0] / 5000, normal(2, 3, 4, 4),
                  pd.alpha_bars(1000), 7, sampler, clip=clip, generator=seeded(1))
    near([*x[0, 0, 0], x.mean(), x.std()], SAMPLES[sampler, clip])

def test_process_and_loss():
    abar = pd.alpha_bars(1000)
    near(abar[[0, 250, 500, 999]], [0.9999, 0.521423, 0.0777967, 4.03583e-05])
    near(pd.alpha_bars(100)[[0, 50, 99]], [0.999, 0.0666656, 2.03901e-05])

    def model(xt, t, condition):
        return 0.5 * xt + t[:, None, None, None] / 1000 + condition
    t = torch.tensor([3, 200, 700, 999])
    near(pd.noise_loss(model, normal(4, 3, 4, 4), 0.1, t, normal(4, 3, 4, 4, seed=1), abar), [0.987819])

def test_average_and_learning_rate():
    average, model = nn.Linear(2, 1), nn.Linear(2, 1)
    for steps, recorded in ((range(5), 1.9995), ((100, 10 ** 6), 1.08191)):
        nn.init.ones_(average.weight)
        nn.init.constant_(model.weight, 2)
        for n in steps:
            pd.update_average(average, model, n)
        near(average.weight, [recorded] * 2)
    cfg = pd.Config(steps=1000, warmup=0.05, lr=2e-3)
    near([pd.learning_rate(n, cfg) for n in (0, 20, 49, 50, 51, 300, 700, 999)],
         [4e-05, 0.00084, 0.002, 0.002, 0.00199999, 0.00167728, 0.000453052, 5.46792e-09])

def test_shapes():
    data = pd.make_shapes(100, 16, seed=3, bias=0.8)
    assert data.labels[:10].tolist() == [6, 8, 7, 7, 0, 0, 0, 5, 1, 9]
    assert data.attributes.sum(0).tolist() == [41, 47, 61, 52, 45]
    near(data.images[7, :, 8].sum(0), [588] * 4 + [470] + [395] * 4 + [447, 581] + [588] * 5, 3e-3)
    near([data.images[data.labels == c].sum() for c in range(10)],
         [1253960, 864261, 460506, 979832, 1069753, 788019, 859050, 742432, 629141, 1076880], 1e-5)

def test_distances_between_distributions():
    a, b = normal(40, 5).double(), (normal(40, 5, seed=1) * 1.5 + 0.3).double()
    near(pd.frechet_distance(*pd.moments(a), *pd.moments(b)), [2.821378454])
    near(pd.inception_score(normal(50, 7) * 2, splits=5), [1.985104714, 0.130016095])
    near(pd.kernel_distance(a, b, subsets=5, size=20), [1.259870651, 0.807577358])

def test_inception_features():
    net = pd.fid_inception()
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    net.fc.weight.data = 0.02 * normal(1008, 2048)
    images = torch.randint(256, (2, 3, 8, 8), generator=seeded()).to(torch.uint8)
    features, logits = pd.inception_features(net, images, CPU)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008)
    near(features[0, :3], [0.01833, 0.367697, 0.0280561], 1e-3)
    near([features.mean(), features.std(), *logits[1, :2]], [0.102187, 0.135532, -0.191236, -0.223429], 1e-3)
