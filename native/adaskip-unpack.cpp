#include "adaskip-unpack.h"

#include "adaskip-topology.h"

#include "ggml-backend.h"

static void to_f32(ggml_tensor * dst, int ith, int nth, void * user_data) {
    GGML_UNUSED(user_data);
    const ggml_tensor * src      = dst->src[0];
    const auto          to_float = ggml_get_type_traits(src->type)->to_float;

    for (int64_t row = src->ne[1] * ith / nth; row < src->ne[1] * (ith + 1) / nth; ++row) {
        to_float((const char *) src->data + row * src->nb[1], (float *) ((char *) dst->data + row * dst->nb[1]),
                src->ne[0]);
    }
}

bool adaskip_is_on_cpu(const ggml_tensor * t) {
    if (!t->buffer || !ggml_backend_buffer_is_host(t->buffer)) {
        return false;
    }
    auto * dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(t->buffer));
    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

bool adaskip_can_unpack(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && ggml_is_quantized(t->type) && ggml_is_matrix(t) && ggml_is_contiguous(t) &&
           ggml_get_type_traits(t->type)->to_float && adaskip_layer_of_weight(t) >= 0 && adaskip_is_on_cpu(t);
}

ggml_tensor * adaskip_unpacked(ggml_context * ctx, ggml_tensor * t) {
    return ggml_custom_4d(ctx, GGML_TYPE_F32, t->ne[0], t->ne[1], 1, 1, &t, 1, to_f32, GGML_N_TASKS_MAX, nullptr);
}
