#include "adaskip-online.h"

#include <algorithm>
#include <cmath>
#include <limits>

static constexpr double ADASKIP_NAN = std::numeric_limits<double>::quiet_NaN();

double adaskip_online::similarity(int il) const {
    return observed(il) ? sum_similarity[il] / (double) ratios[il].size() : ADASKIP_NAN;
}

double adaskip_online::norm_ratio(int il) const {
    return observed(il) ? std::sqrt(sum_v_sq[il] / sum_u_sq[il]) : ADASKIP_NAN;
}

double adaskip_online::scale(int il) const {
    if (!observed(il)) {
        return ADASKIP_NAN;
    }
    switch (params.scale) {
        case ADASKIP_ONLINE_SCALE_NORM:
            return norm_ratio(il);
        case ADASKIP_ONLINE_SCALE_MEDIAN: {
            auto         sorted = ratios[il];
            const size_t half   = sorted.size() / 2;
            std::sort(sorted.begin(), sorted.end());
            return sorted.size() % 2 ? sorted[half] : 0.5 * ((double) sorted[half - 1] + sorted[half]);
        }
        default:
            return 1.0;
    }
}

void adaskip_online::set_params(const std::optional<adaskip_online_params> & value) {
    enabled = value.has_value();
    params  = value.value_or(adaskip_online_params{});
}

void adaskip_online::reset() {
    done     = false;
    n_tokens = 0;
    sum_similarity.clear();
    sum_u_sq.clear();
    sum_v_sq.clear();
    ratios.clear();
}

void adaskip_online::accumulate(const std::vector<float> & values, int64_t n_tokens_ubatch) {
    const size_t n_layer = values.size() / (2 * 3 * n_tokens_ubatch);

    sum_similarity.resize(n_layer, 0.0);
    sum_u_sq.resize(n_layer, 0.0);
    sum_v_sq.resize(n_layer, 0.0);
    ratios.resize(n_layer);

    const int64_t n_new = std::min<int64_t>(n_tokens_ubatch, params.window - n_tokens);
    for (size_t il = 0; il < n_layer; ++il) {
        const float * dot  = values.data() + (2 * il + ADASKIP_FFN) * 3 * n_tokens_ubatch;
        const float * u_sq = dot + n_tokens_ubatch;
        const float * v_sq = u_sq + n_tokens_ubatch;
        for (int64_t i = 0; i < n_new; ++i) {
            if (std::isnan(dot[i]) || u_sq[i] <= 0.0f || v_sq[i] <= 0.0f) {
                continue;
            }
            sum_similarity[il] += dot[i] / (std::sqrt(u_sq[i]) * std::sqrt(v_sq[i]));
            sum_u_sq[il] += u_sq[i];
            sum_v_sq[il] += v_sq[i];
            ratios[il].push_back(std::sqrt(v_sq[i]) / std::sqrt(u_sq[i]));
        }
    }
    n_tokens += (int32_t) n_new;
}

adaskip_skip_set adaskip_online::finish(adaskip_skip_set value) {
    done         = true;
    value.set_id = adaskip_online_set_id(value.set_id, params);

    const size_t n_layer = ratios.size();
    bool         any     = false;
    for (size_t il = 0; il < n_layer; ++il) {
        const double s = scale((int) il);
        if (!observed((int) il) || similarity((int) il) < params.threshold || !std::isfinite(s)) {
            continue;
        }
        if (value.empty()) {
            value.skip.assign(2 * n_layer, 0);
            value.scale.assign(2 * n_layer, 1.0f);
            value.attention.assign(n_layer, false);
        }
        value.skip[2 * il + ADASKIP_FFN]  = 1;
        value.scale[2 * il + ADASKIP_FFN] = (float) s;
        any                               = true;
    }
    return any ? value : adaskip_skip_set{};
}
