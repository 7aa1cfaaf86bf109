// A part of bindings.cpp: the fields of launches for layers of one x.
template <>
struct Fields<SiblingsForward> {
  using P = SiblingsForward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(count), REQUIRED(M), REQUIRED(K), REQUIRED(N), OPTIONAL(R), REQUIRED(x),
      REQUIRED(stride_x), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(bias), OPTIONAL(xa), OPTIONAL(stride_xa),
      OPTIONAL(b), OPTIONAL(stride_b), REQUIRED(y), REQUIRED(stride_y), OPTIONAL(rounded), OPTIONAL(tiling)};
};
template <>
struct Fields<SiblingsDx> {
  using P = SiblingsDx;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(count), REQUIRED(M), REQUIRED(K), OPTIONAL(R), REQUIRED(N), REQUIRED(dy),
      REQUIRED(stride_dy), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(dyb), OPTIONAL(stride_dyb), OPTIONAL(a),
      OPTIONAL(stride_a), REQUIRED(dx), REQUIRED(stride_dx), OPTIONAL(rounded), OPTIONAL(tiling)};
};
template <>
struct Fields<GatedForward> {
  using P = GatedForward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(activation), REQUIRED(M), REQUIRED(N), REQUIRED(K), OPTIONAL(R), REQUIRED(x),
      REQUIRED(stride_x), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(bias), OPTIONAL(xa), OPTIONAL(stride_xa),
      OPTIONAL(b), OPTIONAL(stride_b), REQUIRED(gate), REQUIRED(stride_gate), OPTIONAL(up), OPTIONAL(stride_up),
      REQUIRED(h), REQUIRED(stride_h), OPTIONAL(rounded), OPTIONAL(tiling)};
};
template <>
struct Fields<GatedBackward> {
  using P = GatedBackward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(activation), REQUIRED(M), REQUIRED(N), REQUIRED(K), REQUIRED(R), REQUIRED(dy),
      REQUIRED(stride_dy), REQUIRED(w), REQUIRED(stride_w), REQUIRED(dyb), REQUIRED(stride_dyb), REQUIRED(a),
      REQUIRED(stride_a), REQUIRED(gate), REQUIRED(stride_gate), REQUIRED(up), REQUIRED(stride_up),
      REQUIRED(dgate), REQUIRED(stride_dgate), REQUIRED(dup), REQUIRED(stride_dup), REQUIRED(h), REQUIRED(stride_h),
      OPTIONAL(rounded), OPTIONAL(tiling)};
};
