// Online importance learning in decode: observe the FFNs that run, then skip those that change little as well.

#include "adaskip-context.h"

#include <algorithm>
#include <cmath>
#include <limits>

double adaskip_context::online_stage::similarity(int il) const {
    return observed(il) ? sum_similarity[il] / (double) ratios[il].size() : std::numeric_limits<double>::quiet_NaN();
}

double adaskip_context::online_stage::scale(int il, int32_t mode) const {
    if (!observed(il)) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    switch (mode) {
        case ADASKIP_ONLINE_SCALE_NORM:
            return std::sqrt(sum_v_sq[il] / sum_u_sq[il]);
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

void adaskip_context::set_online(const adaskip_online_params * params) {
    online_enabled = params != nullptr;
    online_params  = params ? *params : adaskip_online_params{};
}

void adaskip_context::begin_request() {
    n_decoded = 0;
    online    = {};
}

bool adaskip_context::observes_online() const {
    return online_enabled && !online.done && phase == ADASKIP_PHASE_DECODE;
}

// values: [n_layer][2][3][n_tokens], as adaskip_statistics hands them out
void adaskip_context::accumulate(const std::vector<float> & values, int64_t n_tokens) {
    const size_t n_layer = values.size() / (2 * 3 * n_tokens);

    online.sum_similarity.resize(n_layer, 0.0);
    online.sum_u_sq.resize(n_layer, 0.0);
    online.sum_v_sq.resize(n_layer, 0.0);
    online.ratios.resize(n_layer);

    const int64_t n_new = std::min<int64_t>(n_tokens, online_params.window - online.n_tokens);
    for (size_t il = 0; il < n_layer; ++il) {
        const float * dot  = values.data() + (2 * il + ADASKIP_FFN) * 3 * n_tokens;
        const float * u_sq = dot + n_tokens;
        const float * v_sq = u_sq + n_tokens;
        for (int64_t i = 0; i < n_new; ++i) {
            if (std::isnan(dot[i]) || u_sq[i] <= 0.0f || v_sq[i] <= 0.0f) {
                continue;
            }
            online.sum_similarity[il] += dot[i] / (std::sqrt(u_sq[i]) * std::sqrt(v_sq[i]));
            online.sum_u_sq[il] += u_sq[i];
            online.sum_v_sq[il] += v_sq[i];
            online.ratios[il].push_back(std::sqrt(v_sq[i]) / std::sqrt(u_sq[i]));
        }
    }
    online.n_tokens += (int32_t) n_new;
}

void adaskip_context::finish_online() {
    online.done  = true;
    online.value = {};

    plan value = active_plan();

    const size_t n_layer = online.ratios.size();
    bool         any     = false;
    for (size_t il = 0; il < n_layer; ++il) {
        const double scale = online.scale((int) il, online_params.scale);
        if (!online.observed((int) il) || online.similarity((int) il) < online_params.threshold ||
                !std::isfinite(scale)) {
            continue;
        }
        if (value.empty()) {
            value.skip.assign(2 * n_layer, 0);
            value.scale.assign(2 * n_layer, 1.0f);
            value.attention.assign(n_layer, false);
        }
        value.skip[2 * il + ADASKIP_FFN]  = 1;
        value.scale[2 * il + ADASKIP_FFN] = (float) scale;
        any                               = true;
    }
    if (any) {
        value.id     = plan_id_next++;
        online.value = std::move(value);
    }
}
