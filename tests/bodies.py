"""Bodies of the exercises as students might write them; test_assignment.py judges all of them.

A class an exercise. Its functions `right_` must pass the tests that judge the exercise, though they are written
differently from ours; `wrong_`, and ours with the edits in `wrong` (for what they do: old, new, perhaps old, new), must
not. Only bodies count, which stand in the script and use its names. No handout holds this file.
"""

class add_noise:
    def right_by_powers_and_views(x0, t, eps, abar):
        level = abar.index_select(0, t).view(-1, 1, 1, 1)
        return level ** 0.5 * x0 + (1 - level) ** 0.5 * eps

    def right_image_by_image(x0, t, eps, abar):
        noised = [torch.sqrt(abar[int(n)]) * x + torch.sqrt(1 - abar[int(n)]) * e for x, n, e in zip(x0, t, eps)]
        return torch.stack(noised)

    def wrong_levels_along_the_columns(x0, t, eps, abar):
        a = abar[t] if len(t) == x0.shape[-1] else abar[t][:, None, None, None]
        return a.sqrt() * x0 + (1 - a).sqrt() * eps

    def wrong_in_place(x0, t, eps, abar):
        a = abar[t][:, None, None, None]
        return eps.mul_((1 - a).sqrt()).add_(a.sqrt() * x0)

    wrong = {
        "no roots": ("a.sqrt() * x0 + (1 - a).sqrt()", "a * x0 + (1 - a)"),
        "the root of 1 - abar is 1 - its root": ("(1 - a).sqrt()", "(1 - a.sqrt())"),
        "one level for all images": ("abar[t][:, None, None, None]", "abar[t[0]]"),
        "weights exchanged": ("a.sqrt() * x0 + (1 - a).sqrt() * eps", "(1 - a).sqrt() * x0 + a.sqrt() * eps"),
        "level counted from one": ("abar[t]", "abar[(t - 1).clamp(min=0)]"),
    }

class noise_loss:
    def right_by_hand(model, x0, condition, t, eps, abar):
        a = abar[t].view(-1, 1, 1, 1)
        xt = a.sqrt() * x0 + (1 - a).sqrt() * eps
        error = model(xt, t, condition).to(torch.float32) - eps
        return (error * error).sum() / error.numel()

    def right_mean_of_means(model, x0, condition, t, eps, abar):
        error = (model(add_noise(x0, t, eps, abar), t, condition).float() - eps).pow(2)
        return error.flatten(1).mean(1).mean()

    wrong = {
        "sum over pixels": (
            "F.mse_loss(predicted.float(), eps)",
            "(predicted.float() - eps).square().flatten(1).sum(1).mean()"),
        "absolute error": ("mse_loss", "l1_loss"),
        "in 16 bits": ("predicted.float(), eps)", "predicted, eps.to(predicted.dtype)).float()"),
        "predicts the image": ("predicted.float(), eps", "predicted.float(), x0"),
        "the model sees the clean image": ("model(add_noise(x0, t, eps, abar), t", "model(x0, t"),
        "condition before level": ("t, condition)", "condition, t)"),
        "no gradient": ("predicted.float()", "predicted.float().detach()"),
        "root of the mean": ("F.mse_loss(predicted.float(), eps)", "F.mse_loss(predicted.float(), eps).sqrt()"),
    }

class guided_noise:
    def right_from_the_middle_outwards(model, x, t, condition, null, w):
        if w != 0:
            both = model(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat((condition, null))).to(torch.float32)
            n = len(x)
            return both[:n] + w * (both[:n] - both[n:])
        return model(x, t, condition).to(torch.float32)

    def right_by_lerp(model, x, t, condition, null, w):
        if w == 0:
            return model(x, t, condition).float()
        given, free = model(torch.cat(2 * [x]), torch.cat(2 * [t]), torch.cat([condition, null])).float().split(len(x))
        return torch.lerp(free, given, 1 + w)

    wrong = {
        "weight of Imagen": ("(1 + w) * given - w * free", "free + w * (given - free)"),
        "two calls": (
            "model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([condition, null]))",
            "torch.cat([model(x, t, condition), model(x, t, null)])"),
        "null first": ("[condition, null]", "[null, condition]", "given, free =", "free, given ="),
        "always a doubled batch": ("if w == 0", "if w is None"),
        "16 bits until the end": (
            "both.float().chunk(2)",
            "both.chunk(2)",
            "(1 + w) * given - w * free",
            "((1 + w) * given - w * free).float()"),
        "16 bits without guidance": ("condition).float()", "condition)"),
        "no guidance below zero": ("if w == 0", "if w <= 0"),
    }

class ddim_step:
    def right_by_variances(x0, eps, a, a_next, eta=0.0, noise=None):
        variance = eta ** 2 * (1 - a_next) / (1 - a) * (1 - a / a_next)
        x = torch.sqrt(a_next) * x0 + torch.sqrt(torch.clamp(1 - a_next - variance, min=0)) * eps
        if eta > 0:
            x = x + torch.sqrt(variance) * noise
        return x

    def right_two_cases(x0, eps, a, a_next, eta=0.0, noise=None):
        if eta == 0:
            return a_next ** 0.5 * x0 + (1 - a_next) ** 0.5 * eps
        sigma = eta * ((1 - a_next) / (1 - a)) ** 0.5 * (1 - a / a_next) ** 0.5
        rest = torch.maximum(1 - a_next - sigma * sigma, torch.zeros_like(sigma))
        return a_next ** 0.5 * x0 + rest ** 0.5 * eps + sigma * noise

    wrong = {
        "no clamp": (".clamp(min=0)", ""),
        "noise on top": ("(1 - a_next - sigma ** 2).clamp(min=0)", "(1 - a_next)"),
        "eta is a switch": ("sigma = eta *", "sigma = (eta > 0) *"),
        "variance for its root": ("(1 - a / a_next)).sqrt()", "(1 - a / a_next))"),
        "beta of DDPM for its posterior": ("(1 - a_next) / (1 - a) * ", ""),
        "needs noise": ("mean if eta == 0 else mean + sigma * noise", "mean + sigma * noise"),
        "abar for its root": ("a_next.sqrt() * x0", "a_next * x0"),
    }

class dpmpp_step:
    def right_by_alpha_and_sigma(x, x0, a, a_next, x0_before=None, a_before=None):
        def split(a):
            return a.sqrt(), (1 - a).sqrt(), torch.log(a.sqrt() / (1 - a).sqrt())
        (_, sigma, lam), (alpha_next, sigma_next, lam_next) = split(a), split(a_next)
        h = lam_next - lam
        D = x0
        if x0_before is not None and float(a_next) != 1:
            r = (lam - split(a_before)[2]) / h
            D = x0 + (x0 - x0_before) / (2 * r)
        return sigma_next / sigma * x - alpha_next * (torch.exp(-h) - 1) * D

    def right_without_the_exponential(x, x0, a, a_next, x0_before=None, a_before=None):
        ratio = ((1 - a_next) / (1 - a)).sqrt()
        gain = a_next.sqrt() - ratio * a.sqrt()
        if x0_before is None or a_next == 1:
            return ratio * x + gain * x0
        def snr(a):
            return torch.log(a / (1 - a))
        share = (snr(a_next) - snr(a)) / (snr(a) - snr(a_before)) / 2
        return ratio * x + gain * ((1 + share) * x0 - share * x0_before)

    wrong = {
        "first order alone": ("x0_before is not None and a_next < 1", "False"),
        "r upside down": (
            "(half_log_snr(a) - half_log_snr(a_before)) / h",
            "h / (half_log_snr(a) - half_log_snr(a_before))"),
        "lambda without roots": ("0.5 * (a.log()", "(a.log()"),
        "second order at the end": (" and a_next < 1", ""),
        "correction of the other sign": (
            "(1 + 1 / (2 * r)) * x0 - x0_before / (2 * r)",
            "(1 - 1 / (2 * r)) * x0 + x0_before / (2 * r)"),
        "h and not -h": ("expm1(-h)", "expm1(h)"),
    }

class frechet_distance:
    def right_by_eigenvalues_of_the_product(mu1, sigma1, mu2, sigma2):
        values = torch.linalg.eigvals(sigma1 @ sigma2).real.clamp(min=0)
        distance = torch.dist(mu1, mu2) ** 2 + torch.trace(sigma1 + sigma2) - 2 * values.sqrt().sum()
        return max(float(distance), 0.0)

    def right_root_of_the_other(mu1, sigma1, mu2, sigma2):
        u, s, v = torch.linalg.svd(sigma2)
        root = u @ s.sqrt().diag() @ v
        cross = torch.linalg.eigvalsh(root @ sigma1 @ root.T)
        trace = torch.where(cross > 0, cross, 0.0).sqrt().sum()
        return ((mu1 - mu2) @ (mu1 - mu2) + sigma1.trace() + sigma2.trace() - 2 * trace).clamp(min=0).item()

    def wrong_as_if_they_commuted(mu1, sigma1, mu2, sigma2):
        one, two = (torch.linalg.eigvalsh(s).clamp(min=0) for s in (sigma1, sigma2))
        return max(0.0, ((mu1 - mu2).square().sum() + (one.sqrt() - two.sqrt()).square().sum()).item())

    def wrong_diagonals_alone(mu1, sigma1, mu2, sigma2):
        one, two = sigma1.diagonal().clamp(min=0), sigma2.diagonal().clamp(min=0)
        return ((mu1 - mu2).square().sum() + (one.sqrt() - two.sqrt()).square().sum()).item()

    wrong = {
        "distance of means not squared": ("(mu1 - mu2).square().sum()", "(mu1 - mu2).norm()"),
        "eigenvalues below zero": (".clamp(min=0)", ""),
        "the cross term once": ("- 2 * cross", "- cross"),
        "in float32": ("eigh(sigma1)", "eigh(sigma1.float())", "root @ sigma2 @ root", "root @ sigma2.float() @ root"),
    }

class dce_loss:
    def right_by_logsumexps(d, y, gamma=2.0):
        scores = -gamma * d
        own = scores[torch.arange(len(y)), y].logsumexp(1)
        return (scores.flatten(1).logsumexp(1) - own).mean()

    def right_by_cross_entropy_over_classes(d, y, gamma=2.0):
        return torch.nn.functional.cross_entropy(torch.logsumexp(-gamma * d, dim=2), y)

    wrong = {
        "gamma of the paper always": ("-gamma", "-2.0"),
        "nearest prototype of a class alone": ("log_p.logsumexp(-1)", "log_p.amax(-1)"),
        "softmax over classes": (
            "F.log_softmax(-gamma * d.flatten(1), dim=1).view_as(d)",
            "F.log_softmax(-gamma * d, dim=1)"),
        "far is likely": ("-gamma", "gamma"),
        "sum over images": ("logsumexp(-1), y)", "logsumexp(-1), y, reduction=\"sum\")"),
        "mean over the prototypes of a class": ("log_p.logsumexp(-1)", "log_p.exp().mean(-1).log()"),
        "probabilities that vanish": ("log_p.logsumexp(-1)", "log_p.exp().sum(-1).log()"),
    }

class prototype_loss:
    def right_by_indexing(d, y):
        return d[torch.arange(len(y), device=d.device), y].min(dim=1).values.mean()

    def right_image_by_image(d, y):
        return sum(own[int(label)].min() for own, label in zip(d, y)) / len(y)

    wrong = {
        "mean over own prototypes": ("amin(-1)", "mean(-1)"),
        "nearest of any class": ("gather(1, y[:, None])", "amin(1)"),
        "first prototype": ("d.amin(-1)", "d[:, :, 0]"),
        "root of a squared distance": ("d.amin", "d.sqrt().amin"),
        "sum over images": (".mean()", ".sum()"),
        "farthest": ("amin", "amax"),
    }

class contrastive_loss:
    def right_by_logsumexp(d, k, tau=1.0):
        near = d[torch.arange(len(k)), k]
        return (tau * near + torch.logsumexp(-tau * d, dim=1)).mean()

    def right_by_log_softmax(d, k, tau=1.0):
        return -F.log_softmax(-d * tau, dim=-1).gather(1, k.unsqueeze(1)).mean()

    wrong = {
        "tau divides": ("-tau * d", "-d / tau"),
        "no tau": ("-tau * d", "-d"),
        "far is likely": ("-tau", "tau"),
        "squared distances": ("* d", "* d ** 2"),
        "sum over images": ("d, k)", "d, k, reduction=\"sum\")"),
        "nearest for the chosen": (", k)", ", d.argmin(1))"),
    }

class alignment_loss:
    def right_by_hand(z, prototypes, k):
        difference = z - prototypes.index_select(0, k)
        return (difference ** 2).sum() / difference.numel()

    def right_one_hot(z, prototypes, k):
        chosen = F.one_hot(k, len(prototypes)).to(z.dtype) @ prototypes
        return (chosen - z).pow(2).mean()

    wrong = {
        "sum over dimensions": ("F.mse_loss(z, prototypes[k])", "(z - prototypes[k]).square().sum(1).mean()"),
        "prototypes get no gradient": ("prototypes[k]", "prototypes[k].detach()"),
        "features get no gradient": ("(z,", "(z.detach(),"),
        "not squared": ("F.mse_loss(z, prototypes[k])", "(z - prototypes[k]).norm(dim=1).mean()"),
        "all prototypes": ("F.mse_loss(z, prototypes[k])", "(z[:, None] - prototypes).square().mean()"),
        "prototypes in order": ("prototypes[k]", "prototypes[:len(z)]"),
    }

class compactness_loss:
    def right_by_a_mask(prototypes):
        e = prototypes / prototypes.norm(dim=1, keepdim=True)
        same = torch.eye(len(e), dtype=torch.bool, device=e.device)
        return (e @ e.T).masked_fill(same, 0).pow(2).sum()

    def right_twice_the_upper_triangle(prototypes):
        cos = F.cosine_similarity(prototypes[:, None], prototypes[None], dim=2)
        return 2 * cos.triu(1).square().sum()

    wrong = {
        "each pair once": ("(e @ e.T)", "(e @ e.T).triu()"),
        "products for cosines": ("F.normalize(prototypes, dim=1)", "prototypes"),
        "not squared": ("square()", "abs()"),
        "diagonal too": (" * (1 - torch.eye(len(e), device=e.device))", ""),
        "mean over pairs": (".sum()", ".mean()"),
        "normalised over prototypes": ("dim=1", "dim=0"),
    }

class balanced_assignment:
    def right_without_logarithms(scores, rounds=3):
        q = (scores - scores.max()).exp()
        for _ in range(rounds):
            q = q / q.sum(0, keepdim=True)
            q = q / q.sum(1, keepdim=True)
        return q

    def right_with_columns_of_a_share_each(scores, rounds=3):
        B, K = scores.shape
        log_q = scores
        for _ in range(rounds):
            log_q = log_q - log_q.logsumexp(0) + math.log(B / K)
            log_q = log_q - log_q.logsumexp(1)[:, None]
        return log_q.exp()

    wrong = {
        "rows first": ("log_softmax(0).log_softmax(1)", "log_softmax(1).log_softmax(0)"),
        "three rounds always": ("range(rounds)", "range(3)"),
        "one softmax": ("scores.log_softmax(0).log_softmax(1)", "scores.log_softmax(1)"),
        "a round too many": ("range(rounds)", "range(rounds + 1)"),
        "logarithms": ("scores.exp()", "scores"),
        "scores for their exponentials": (
            "scores.log_softmax(0).log_softmax(1)",
            "(scores / scores.sum(0)).log_softmax(1)"),
    }

class swapped_loss:
    def right_by_two_loops(cosines):
        B = len(cosines[0])
        targets = [balanced_assignment(in_all_processes(20 * cos))[RANK * B:RANK * B + B] for cos in cosines]
        total, pairs = 0.0, 0
        for i, cos in enumerate(cosines):
            for j, target in enumerate(targets):
                if i != j:
                    total = total - (target * F.log_softmax(10 * cos, dim=1)).sum(1).mean()
                    pairs += 1
        return total / pairs

    def right_by_the_sum_of_the_others(cosines):
        B, n = len(cosines[0]), len(cosines)
        q = torch.stack([balanced_assignment(in_all_processes(cos / 0.05)).split(B)[RANK] for cos in cosines])
        log_p = torch.stack([(cos / 0.1).log_softmax(1) for cos in cosines])
        return -((q.sum(0) - q) * log_p).sum(2).mean() / (n - 1)

    wrong = {
        "each view its own": ("q[:i] + q[i + 1:]", "[q[i]]"),
        "temperatures exchanged": (
            "cos / 0.05",
            "cos / 0.1",
            "F.cross_entropy(cos / 0.1",
            "F.cross_entropy(cos / 0.05"),
        "the next view alone": ("q[:i] + q[i + 1:]", "[q[i - 1]]"),
        "sum over pairs": (" / len(pairs)", ""),
        "this process alone": (
            "balanced_assignment(in_all_processes(cos / 0.05))[own]",
            "balanced_assignment(cos / 0.05)"),
        "rows of the first process": ("RANK * len(cosines[0]), (RANK + 1) * len(cosines[0])", "0, len(cosines[0])"),
        "processes assign apart": (
            "balanced_assignment(in_all_processes(cos / 0.05))",
            "in_all_processes(balanced_assignment(cos / 0.05))"),
    }

class PrototypeAttention_forward:
    def right_by_einsum(self, h, tokens):
        B, C, H, W = h.shape
        q = self.q(self.norm(h).permute(0, 2, 3, 1).reshape(B, H * W, C)).view(B, H * W, self.heads, -1)
        k, v = (part.reshape(B, tokens.shape[1], self.heads, -1) for part in self.kv(tokens).chunk(2, dim=-1))
        scores = torch.einsum("bphc,bnhc->bhpn", q, k) / math.sqrt(C / self.heads)
        mixed = torch.einsum("bhpn,bnhc->bphc", scores.softmax(-1), v).reshape(B, H * W, C)
        return h + self.out(mixed).permute(0, 2, 1).view(B, C, H, W)

    def right_head_by_head(self, h, tokens):
        B, C, H, W = h.shape
        q = self.q(self.norm(h).flatten(2).mT)
        k, v = self.kv(tokens).split(C, dim=2)
        c = C // self.heads
        found = []
        for i in range(self.heads):
            part = slice(i * c, (i + 1) * c)
            scores = q[..., part] @ k[..., part].mT * c ** -0.5
            found.append(scores.softmax(2) @ v[..., part])
        return h + self.out(torch.cat(found, 2)).mT.reshape(B, C, H, W)

    wrong = {
        "nothing is added to": ("h + found", "found"),
        "no gradient through the softmax": (
            "F.scaled_dot_product_attention(q, k, v)",
            "F.scaled_dot_product_attention(q.detach(), k.detach(), v)"),
        "one head": ("self.heads", "1"),
        "pixels not normalised": ("self.norm(h)", "h"),
        "keys and values exchanged": ("k, v = kv", "v, k = kv"),
        "softmax over pixels": (
            "F.scaled_dot_product_attention(q, k, v)",
            "(q @ k.mT / q.shape[-1] ** 0.5).softmax(2) @ v"),
        "scale of all channels": (
            "F.scaled_dot_product_attention(q,",
            "F.scaled_dot_product_attention(q / self.heads ** 0.5,"),
    }

class PDM_learn:
    def right_case_by_case(self, x0, label, cfg):
        statistics = {}
        with torch.autocast(x0.device.type, enabled=False):
            if self.two_views:
                images = torch.cat([x0, random_view(x0, cfg), random_view(x0, cfg)])
                z, one, two = F.normalize(self.encoder(images), dim=1).chunk(3)
                e = F.normalize(self.prototypes, dim=1)
                contrastive = swapped_loss([z @ e.T, one @ e.T, two @ e.T])
            else:
                z, e = self.encoder(x0), self.prototypes
            k = label
            if k is None:
                k = (z[:, None] - e).norm(dim=2).argmin(dim=1)
            if not self.two_views:
                contrastive = contrastive_loss(distances(z, e), k)
            losses = dict(contrastive=contrastive, alignment=alignment_loss(z, e, k))
            if label is None:
                losses["compactness"] = compactness_loss(e)
        if self.training:
            share = torch.bincount(k, minlength=len(e)) / len(k)
            self.usage.copy_(0.99 * self.usage + 0.01 * share)
        p = self.usage[self.usage > 0]
        statistics["variance_of_z"] = z.detach().var(dim=0, unbiased=False).sum()
        statistics["usage_perplexity"] = (-(p * p.log()).sum()).exp()
        statistics["dead_prototypes"] = (self.usage < 0.01 * self.usage.new_ones(()) / len(e)).sum()
        return k, losses, statistics

    def right_by_small_steps(self, x0, label, cfg):
        with torch.autocast(x0.device.type, enabled=False):
            x0 = x0.float()
            inputs = [x0]
            if self.two_views:
                inputs += random_view(torch.cat([x0, x0]), cfg).chunk(2)
            z_all = self.normed(self.encoder(torch.cat(inputs)))
            e = self.normed(self.prototypes)
            parts = z_all.chunk(len(inputs))
            z = parts[0]
            d = distances(z, e)
            k = torch.argmin(d, dim=1) if label is None else label
            if len(parts) > 1:
                first = swapped_loss([part @ e.mT for part in parts])
            else:
                first = contrastive_loss(d, k)
            losses = {"contrastive": first, "alignment": alignment_loss(z, e, k)}
            if label is None:
                losses["compactness"] = compactness_loss(e)
        if self.training:
            with torch.no_grad():
                self.usage.mul_(0.99).add_(0.01 * torch.eye(len(e), device=k.device)[k].mean(0))
        centred = z.detach() - z.detach().mean(0)
        entropy = -torch.xlogy(self.usage, self.usage).sum()
        return k, losses, {"variance_of_z": centred.square().mean(0).sum(), "usage_perplexity": torch.exp(entropy),
                           "dead_prototypes": torch.count_nonzero(self.usage * len(e) < 0.01).float()}

    wrong = {
        "farthest prototype": ("argmin", "argmax"),
        "compactness for labels too": ("if label is None:", "if True:"),
        "views encoded one by one": (
            "self.normed(self.encoder(torch.cat(views))).split(len(x0))",
            "[self.normed(self.encoder(view)) for view in views]"),
        "the clean image is not swapped": ("for v in z_views]", "for v in z_views[1:]]"),
        "in mixed precision": ("enabled=False", "enabled=torch.is_autocast_enabled(x0.device.type)"),
        "counts without training": ("if self.training", "if True"),
        "the encoder gets no gradient": ("torch.cat(views))", "torch.cat(views)).detach()"),
        "usage of the batch": ("entr(self.usage)", "entr(F.one_hot(k, len(e)).float().mean(0))"),
        "dead prototypes as a share": (".float().sum()", ".float().mean()"),
        "never counts": ("if self.training", "if False"),
        "unbiased variance": ("var(0, correction=0)", "var(0)"),
        "variance not summed": ("correction=0).sum()", "correction=0).mean()"),
        "entropy in bits": ("torch.special.entr(self.usage).sum().exp()", "2 ** torch.special.entr(self.usage).sum()"),
        "dead below 1 % of all": ("0.01 / len(e)", "0.01"),
        "prototypes not of length one": ("self.normed(self.prototypes)", "self.prototypes"),
        "label ignored": ("d.argmin(1) if label is None else label", "d.argmin(1)"),
    }

class receptive_field:
    def right_from_the_last_layer_back(encoder):
        start, size, step = 0, 1, 1
        for layer in reversed([layer for layer in encoder if isinstance(layer, nn.Conv2d)]):
            kernel, stride, padding = layer.kernel_size[0], layer.stride[0], layer.padding[0]
            start = start * stride - padding
            size = (size - 1) * stride + kernel
            step *= stride
        return start, size, step

    def right_by_first_and_last_pixel(encoder):
        first, last, step = 0, 0, 1
        for layer in encoder:
            if hasattr(layer, "kernel_size"):
                first -= step * layer.padding[0]
                last += step * (layer.kernel_size[0] - 1 - layer.padding[0])
                step *= layer.stride[0]
        return first, last - first + 1, step

    wrong = {
        "no padding": ("start -= layer.padding[0] * step", "pass"),
        "own stride too early": (
            "start -= layer", "step *= layer.stride[0]; start -= layer", "step *= layer.stride[0]\n", "pass\n"),
        "kernels added up": ("(layer.kernel_size[0] - 1) * step", "layer.kernel_size[0] - 1"),
        "strides added up": ("step *= layer.stride[0]", "step += layer.stride[0] - 1"),
        "kernel and not kernel less one": (
            "size = 1",
            "size = 0",
            "(layer.kernel_size[0] - 1)",
            "layer.kernel_size[0]"),
        "padding on both sides": ("start -= layer", "start -= 2 * layer"),
    }

class patch_distances:
    def right_by_a_convolution(z, prototypes):
        with torch.autocast(z.device.type, enabled=False):
            z, p = z.float(), prototypes.float()
            cross = F.conv2d(z, p[:, :, None, None])
            ones = (z ** 2).sum(dim=1, keepdim=True)
            return F.relu(ones - 2 * cross + (p ** 2).sum(dim=1).view(1, -1, 1, 1))

    def right_by_matrices(z, prototypes):
        with torch.autocast(z.device.type, enabled=False):
            B, D, h, w = z.shape
            patches, p = z.float().flatten(2), prototypes.float()
            d = patches.pow(2).sum(1)[:, None] - 2 * p @ patches + p.pow(2).sum(1)[:, None]
            return d.clamp_min(0).view(B, len(p), h, w)

    wrong = {
        "no clamp": ("d.clamp(min=0)", "d"),
        "in mixed precision": ("enabled=False", "enabled=torch.is_autocast_enabled(z.device.type)"),
        "root": ("d.clamp(min=0)", "d.clamp(min=0).sqrt()"),
        "mean over dimensions": ("d.clamp(min=0)", "d.clamp(min=0) / z.shape[1]"),
        "cross term once": ("2 * cross", "cross"),
        "rows and columns exchanged": ("d.clamp(min=0)", "d.clamp(min=0).mT"),
        "prototypes get no gradient": ("prototypes.float()", "prototypes.float().detach()"),
        "prototypes not squared": ("p.square()", "p.abs()"),
    }

class activation:
    def right_difference_of_logarithms(d):
        return (d + 1).log() - (d + 1e-4).log()

    def right_minus_the_inverse(d):
        return -torch.log((d + 0.0001) / (1 + d))

    wrong = {
        "sign": ("(d + 1) / (d + 1e-4)", "(d + 1e-4) / (d + 1)"),
        "root of d": ("torch.log(", "d = d.sqrt()\n    return torch.log(", "return d =", "d ="),
        "logarithm to base ten": ("log(", "log10("),
        "another constant": ("1e-4", "1e-5"),
        "one is forgotten": ("(d + 1) /", "1 /"),
        "no gradient": ("(d + 1)", "(d.detach() + 1)"),
        "infinite at zero": ("(d + 1e-4)", "d"),
    }

class invert:
    def right_step_by_step(predict, x0, abar, steps):
        times = sorted(sample_times(len(abar), steps))
        x, a = x0, torch.ones(())
        for i, t in enumerate(times):
            told = times[max(i - 1, 0)]
            eps = predict(x, torch.tensor([told] * len(x), device=x.device))
            a_next = abar[t].cpu()
            x = a_next.sqrt() / a.sqrt() * (x - (1 - a).sqrt() * eps) + (1 - a_next).sqrt() * eps
            a = a_next
        return x

    def right_in_units_of_sqrt_abar(predict, x0, abar, steps):
        levels = list(reversed(sample_times(len(abar), steps)))
        y, before = x0, 0.0                                         # x / sqrt(abar), and sqrt(1 / abar - 1)
        for i, level in enumerate(levels):
            t = levels[max(0, i - 1)]
            eps = predict(y / math.sqrt(1 + before ** 2), torch.full((x0.shape[0],), t, device=x0.device))
            after = math.sqrt(1 / abar[level].item() - 1)
            y, before = y + (after - before) * eps, after
        return y / math.sqrt(1 + before ** 2)

    wrong = {
        "the level that comes": ("[times[0], *times[:-1]]", "times"),
        "noisiest first": ("[::-1]", ""),
        "starts as if noisy already": ("[torch.ones(()), *abar.cpu()[times]]", "[abar[0], *abar.cpu()[times]]"),
        "clips the image": ("/ a.sqrt()   #", "/ a.sqrt(); clean = clean.clamp(-1, 1)  #"),
        "stops a level early": ("levels, levels[1:])", "levels[:-1], levels[1:-1])"),
        "one level for all": ("(len(x),), t,", "(len(x),), times[0],"),
        "levels a step apart": (
            "sample_times(len(abar), steps)[::-1]",
            "[i * (len(abar) // steps) for i in range(steps)]"),
    }

class auroc:
    def right_by_all_pairs(score, positive):
        if positive.all() or not positive.any():
            return float("nan")
        above = score[positive][:, None] - score[~positive][None]
        return ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()

    def right_by_searching(score, positive):
        high, low = score[positive], score[~positive].sort().values
        if len(high) == 0 or len(low) == 0:
            return math.nan
        below = torch.searchsorted(low, high.contiguous())
        up_to = torch.searchsorted(low, high.contiguous(), right=True)
        return (below + up_to).double().sum().item() / (2 * len(high) * len(low))

    def wrong_ties_by_their_order(score, positive):
        P = positive.sum().item()
        N = len(score) - P
        if P * N == 0:
            return math.nan
        rank = score.argsort().argsort().double() + 1
        return (rank[positive].sum().item() - P * (P + 1) / 2) / (P * N)

    def wrong_never_below_chance(score, positive):
        if positive.all() or not positive.any():
            return math.nan
        above = score[positive][:, None] - score[~positive]
        area = ((above > 0).double() + 0.5 * (above == 0).double()).mean().item()
        return max(area, 1 - area)

    wrong = {
        "ties count nothing": ("(count - 1) / 2", "(count - 1)"),
        "ties count whole": ("(count - 1) / 2", "0"),
        "negatives above": ("rank[positive]", "rank[~positive]"),
        "chance without either": ("math.nan", "0.5"),
        "ranks from 0": ("- (count - 1) / 2)", "- (count + 1) / 2)"),
        "only positives may be missing": ("P * N == 0", "P == 0", "/ (P * N)", "/ max(1, P * N)"),
    }

class spherical:
    def right_by_a_dot_product(a, b, share):
        x, y = a.reshape(-1), b.reshape(-1)
        angle = torch.acos((x @ y / (x.norm() * y.norm())).clamp(-0.9999, 0.9999))
        weights = torch.stack([torch.sin((1 - share) * angle), torch.sin(share * angle)]) / torch.sin(angle)
        return torch.einsum("n,chw->nchw", weights[0], a) + torch.einsum("n,chw->nchw", weights[1], b)

    def right_one_at_a_time(a, b, share):
        cosine = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
        angle = math.acos(min(0.9999, max(-0.9999, cosine.item())))
        return torch.stack([(math.sin((1 - u) * angle) * a + math.sin(u * angle) * b) / math.sin(angle)
                            for u in share.tolist()])

    wrong = {
        "linear": (
            "torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)",
            "(1 - share) * a + share * b)"),
        "no limits": (".clamp(-0.9999, 0.9999)", ""),
        "upper limit alone": ("clamp(-0.9999, 0.9999)", "clamp(max=0.9999)"),
        "the other way round": (
            "(1 - share) * angle) * a",
            "share * angle) * a",
            "(share * angle) * b",
            "((1 - share) * angle) * b"),
        "an angle for each pixel": ("a.flatten(), b.flatten()", "a, b"),
        "product for the cosine": ("F.cosine_similarity(a.flatten(), b.flatten(), dim=0)", "(a * b).mean()"),
        "cosine for the angle": (".acos()", ""),
    }

class choose_movers:
    def right_by_auroc_one_by_one(s, known, a, b, n=3):
        def strength(column):
            values = [auroc(s[:, j], known[:, column]) for j in range(s.shape[1])]
            return [0.5 if math.isnan(v) else max(v, 1 - v) for v in values]
        for_a, for_b = strength(a), strength(b)
        numbers = range(s.shape[1])
        taken = set(sorted(numbers, key=lambda j: -for_b[j])[:n])
        return sorted([j for j in numbers if j not in taken], key=lambda j: -for_a[j])[:n]

    def right_by_distance_from_chance(s, known, a, b, n=3):
        away = torch.nan_to_num((single_aurocs(s, known) - 0.5).abs(), 0.0)
        away_a = away[:, a].clone()
        away_a[away[:, b].topk(n).indices] = -1
        return [j for j in away_a.argsort(descending=True).tolist() if away_a[j] >= 0][:n]

    wrong = {
        "high alone tells": ("torch.maximum(auc, 1 - auc)", "auc"),
        "excludes afterwards": (
            "[j for j in order if j not in excluded][:n]",
            "[j for j in order[:n] if j not in excluded]"),
        "excludes nothing": ("if j not in excluded", ""),
        "undefined tells most": ("nan_to_num(0.5)", "nan_to_num(1.0)"),
        "three always": ("topk(n)", "topk(3)", "[:n]", "[:3]"),
        "traits exchanged": ("[a, b]", "[b, a]"),
        "in order of their numbers": (
            "[j for j in order if j not in excluded][:n]",
            "sorted([j for j in order if j not in excluded][:n])"),
        "worst first": ("descending=True", "descending=False"),
    }
