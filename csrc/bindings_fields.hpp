// A part of bindings.cpp: the fields of every launch, by keyword.
#define REQUIRED(member) {#member, true, store<&P::member>}
#define OPTIONAL(member) {#member, false, store<&P::member>}

template <>
struct Fields<Linear> {
  using P = Linear;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(M), REQUIRED(N), REQUIRED(K), OPTIONAL(R), OPTIONAL(transposed), REQUIRED(x),
      REQUIRED(stride_x), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(bias), OPTIONAL(xa), OPTIONAL(stride_xa),
      OPTIONAL(b), OPTIONAL(stride_b), REQUIRED(y), REQUIRED(stride_y), OPTIONAL(overlap_previous),
      OPTIONAL(tiling), REQUIRED(workspace), OPTIONAL(a), OPTIONAL(stride_a), OPTIONAL(seed),
      OPTIONAL(drop_below), OPTIONAL(sum_blocks), OPTIONAL(layer_x), OPTIONAL(stride_layer_x), OPTIONAL(da),
      OPTIONAL(da_type), OPTIONAL(layer_xa), OPTIONAL(stride_layer_xa), OPTIONAL(db), OPTIONAL(db_type),
      OPTIONAL(scale)};
};
template <>
struct Fields<FusedBackward> {
  using P = FusedBackward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(M), REQUIRED(N), REQUIRED(K), REQUIRED(R), REQUIRED(dy), REQUIRED(stride_dy),
      REQUIRED(w), REQUIRED(stride_w), REQUIRED(a), REQUIRED(stride_a), REQUIRED(b), REQUIRED(stride_b),
      OPTIONAL(scale), REQUIRED(dyb), REQUIRED(stride_dyb), REQUIRED(dx), REQUIRED(stride_dx), OPTIONAL(x),
      OPTIONAL(stride_x), OPTIONAL(da), OPTIONAL(da_type), OPTIONAL(xa), OPTIONAL(stride_xa), OPTIONAL(db),
      OPTIONAL(db_type), OPTIONAL(rounded_a), OPTIONAL(rounded_b), OPTIONAL(sum_rows), OPTIONAL(partials),
      REQUIRED(workspace), OPTIONAL(tiling)};
};
template <>
struct Fields<FusedForward> {
  using P = FusedForward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(M), REQUIRED(N), REQUIRED(K), REQUIRED(R), REQUIRED(x), REQUIRED(stride_x), REQUIRED(w),
      REQUIRED(stride_w), OPTIONAL(bias), REQUIRED(a), REQUIRED(stride_a), REQUIRED(b), REQUIRED(stride_b),
      REQUIRED(xa), REQUIRED(stride_xa), REQUIRED(y), REQUIRED(stride_y), OPTIONAL(rounded_a), OPTIONAL(rounded_b),
      REQUIRED(workspace), OPTIONAL(tiling)};
};
template <>
struct Fields<SplitLinear> {
  using P = SplitLinear;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(a_type), REQUIRED(b_type), REQUIRED(M), REQUIRED(N), REQUIRED(K), REQUIRED(R),
      REQUIRED(x), REQUIRED(stride_x), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(bias), REQUIRED(a),
      REQUIRED(stride_a), REQUIRED(b), REQUIRED(stride_b), OPTIONAL(scale), REQUIRED(xa), REQUIRED(stride_xa),
      REQUIRED(y), REQUIRED(stride_y), OPTIONAL(splits), OPTIONAL(tiling)};
};
template <>
struct Fields<SiblingsForward> {
  using P = SiblingsForward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(count), REQUIRED(M), REQUIRED(K), REQUIRED(N), OPTIONAL(R), REQUIRED(x),
      REQUIRED(stride_x), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(bias), OPTIONAL(xa), OPTIONAL(stride_xa),
      OPTIONAL(b), OPTIONAL(stride_b), REQUIRED(y), REQUIRED(stride_y), OPTIONAL(rounded), OPTIONAL(tiling),
      REQUIRED(workspace)};
};
template <>
struct Fields<SiblingsDx> {
  using P = SiblingsDx;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(count), REQUIRED(M), REQUIRED(K), REQUIRED(N), REQUIRED(dy), REQUIRED(stride_dy),
      REQUIRED(w), REQUIRED(stride_w), OPTIONAL(lows), OPTIONAL(R), OPTIONAL(dyb), OPTIONAL(stride_dyb), OPTIONAL(a),
      OPTIONAL(stride_a), OPTIONAL(seed), OPTIONAL(drop_below), OPTIONAL(rounded), REQUIRED(dx), REQUIRED(stride_dx),
      OPTIONAL(tiling), REQUIRED(workspace)};
};
template <>
struct Fields<GatedForward> {
  using P = GatedForward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(activation), REQUIRED(M), REQUIRED(N), REQUIRED(K), OPTIONAL(R), REQUIRED(x),
      REQUIRED(stride_x), REQUIRED(w), REQUIRED(stride_w), OPTIONAL(bias), OPTIONAL(xa), OPTIONAL(stride_xa),
      OPTIONAL(b), OPTIONAL(stride_b), REQUIRED(gate), REQUIRED(stride_gate), OPTIONAL(up), OPTIONAL(stride_up),
      REQUIRED(h), REQUIRED(stride_h), OPTIONAL(R_down), OPTIONAL(a_down), OPTIONAL(stride_a_down), OPTIONAL(ha),
      OPTIONAL(stride_ha), OPTIONAL(partials), OPTIONAL(rounded), OPTIONAL(tiling), REQUIRED(workspace)};
};
template <>
struct Fields<GatedBackward> {
  using P = GatedBackward;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(activation), REQUIRED(M), REQUIRED(N), REQUIRED(K), REQUIRED(R), REQUIRED(dy),
      REQUIRED(stride_dy), REQUIRED(w), REQUIRED(stride_w), REQUIRED(dyb), REQUIRED(stride_dyb), REQUIRED(a),
      REQUIRED(stride_a), REQUIRED(gate), REQUIRED(stride_gate), REQUIRED(up), REQUIRED(stride_up),
      REQUIRED(dgate), REQUIRED(stride_dgate), REQUIRED(dup), REQUIRED(stride_dup), REQUIRED(h), REQUIRED(stride_h),
      OPTIONAL(seed), OPTIONAL(drop_below), OPTIONAL(rounded), OPTIONAL(tiling), REQUIRED(workspace)};
};
template <>
struct Fields<GroupedLinear> {
  using P = GroupedLinear;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(rows), REQUIRED(groups), REQUIRED(N), REQUIRED(K), OPTIONAL(R),
      OPTIONAL(transposed), REQUIRED(offsets), REQUIRED(x), REQUIRED(stride_x), REQUIRED(w), OPTIONAL(bias),
      OPTIONAL(xa), OPTIONAL(stride_xa), OPTIONAL(b), REQUIRED(y), REQUIRED(stride_y),
      OPTIONAL(overlap_previous), OPTIONAL(tiling), REQUIRED(workspace)};
};
template <>
struct Fields<GatheredLinear> {
  using P = GatheredLinear;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(rows), REQUIRED(groups), REQUIRED(N), REQUIRED(K), OPTIONAL(R),
      OPTIONAL(transposed), REQUIRED(offsets), OPTIONAL(order), OPTIONAL(choices), REQUIRED(x), REQUIRED(stride_x),
      REQUIRED(w), OPTIONAL(bias), OPTIONAL(xa), OPTIONAL(stride_xa), OPTIONAL(b), REQUIRED(y), REQUIRED(stride_y),
      REQUIRED(workspace), OPTIONAL(activation), OPTIONAL(h), OPTIONAL(stride_h), OPTIONAL(u), OPTIONAL(stride_u),
      OPTIONAL(row_scale), OPTIONAL(products), OPTIONAL(tiling)};
};
template <>
struct Fields<RaggedRanks> {
  using P = RaggedRanks;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(rows), REQUIRED(groups), REQUIRED(C), REQUIRED(R), REQUIRED(offsets), OPTIONAL(order),
      OPTIONAL(choices), REQUIRED(wide), REQUIRED(stride_wide), OPTIONAL(b), OPTIONAL(projected),
      OPTIONAL(stride_projected), OPTIONAL(narrow), OPTIONAL(stride_narrow), OPTIONAL(outer), OPTIONAL(outer_type),
      OPTIONAL(transposed), OPTIONAL(scale), OPTIONAL(workspace)};
};
template <>
struct Fields<Round> {
  using P = Round;
  static constexpr Field fields[] = {
      REQUIRED(in_type), REQUIRED(type), OPTIONAL(transposed), REQUIRED(rows), REQUIRED(columns), REQUIRED(in),
      REQUIRED(stride_in), OPTIONAL(scale), OPTIONAL(out), REQUIRED(stride_out)};
};
template <>
struct Fields<ProjectX> {
  using P = ProjectX;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(a_type), REQUIRED(M), REQUIRED(K), REQUIRED(R), REQUIRED(x), REQUIRED(stride_x),
      REQUIRED(a), REQUIRED(stride_a), REQUIRED(xa), REQUIRED(stride_xa), OPTIONAL(seed), OPTIONAL(drop_below),
      OPTIONAL(rounded)};
};
template <>
struct Fields<ReduceDy> {
  using P = ReduceDy;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(b_type), REQUIRED(M), REQUIRED(N), REQUIRED(R), REQUIRED(dy),
      REQUIRED(stride_dy), OPTIONAL(b), OPTIONAL(stride_b), OPTIONAL(xa), OPTIONAL(stride_xa), OPTIONAL(scale),
      OPTIONAL(dyb), OPTIONAL(stride_dyb), OPTIONAL(db), OPTIONAL(dbias), OPTIONAL(workspace), OPTIONAL(dyb_bytes),
      OPTIONAL(sms), OPTIONAL(rounded)};
};
template <>
struct Fields<ReduceEach> {
  using P = ReduceEach;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(count), REQUIRED(M), REQUIRED(b_type), REQUIRED(N), REQUIRED(R), REQUIRED(dy),
      REQUIRED(stride_dy), OPTIONAL(b), OPTIONAL(stride_b), OPTIONAL(xa), OPTIONAL(stride_xa), REQUIRED(scale),
      OPTIONAL(dyb), OPTIONAL(stride_dyb), OPTIONAL(db), OPTIONAL(dbias), OPTIONAL(workspace), OPTIONAL(dyb_bytes),
      OPTIONAL(sms)};
};
template <>
struct Fields<ReduceX> {
  using P = ReduceX;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(a_type), REQUIRED(M), REQUIRED(K), REQUIRED(R), REQUIRED(x), REQUIRED(stride_x),
      REQUIRED(dyb), REQUIRED(stride_dyb), REQUIRED(da), OPTIONAL(seed), OPTIONAL(drop_below),
      OPTIONAL(workspace), OPTIONAL(sms)};
};

template <>
struct Fields<DecodeCodebook> {
  using P = DecodeCodebook;
  static constexpr Field fields[] = {
      REQUIRED(type), REQUIRED(count), OPTIONAL(first), REQUIRED(block_size), REQUIRED(data), REQUIRED(code),
      REQUIRED(absmax), OPTIONAL(nested_code), OPTIONAL(nested_absmax), OPTIONAL(nested_offset), OPTIONAL(rounded),
      REQUIRED(out)};
};
template <>
struct Fields<DecodeFp8> {
  using P = DecodeFp8;
  static constexpr Field fields[] = {
      REQUIRED(type), OPTIONAL(G), REQUIRED(N), REQUIRED(K), REQUIRED(block_rows), REQUIRED(block_columns),
      REQUIRED(data), REQUIRED(scale), OPTIONAL(scale_type), OPTIONAL(rounded_scale), OPTIONAL(rounded),
      REQUIRED(out)};
};

template <>
struct Fields<ProbeColumns> {
  using P = ProbeColumns;
  static constexpr Field fields[] = {REQUIRED(M), REQUIRED(N), REQUIRED(K),  REQUIRED(x),  REQUIRED(w),
                                     OPTIONAL(a), REQUIRED(y), OPTIONAL(xa), OPTIONAL(sms)};
};
template <>
struct Fields<ProbeFlags> {
  using P = ProbeFlags;
  static constexpr Field fields[] = {REQUIRED(rounds), REQUIRED(words)};
};

#undef REQUIRED
#undef OPTIONAL
