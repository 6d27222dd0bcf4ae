# adaskip_unite_models(): lets the target llama compile 16 of llama.cpp's files of models at a time, as its newer releases
# do themselves. 0.3.35 and older compile each of over 100 files alone.

function(adaskip_unite_models)
    get_target_property(united llama UNITY_BUILD)
    if(united)
        return()
    endif()
    get_target_property(folder llama SOURCE_DIR)
    get_target_property(sources llama SOURCES)
    foreach(source IN LISTS sources)
        if(NOT source MATCHES "^models/")
            cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY "${folder}")
            set_source_files_properties("${source}" TARGET_DIRECTORY llama PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
        endif()
    endforeach()
    set_target_properties(llama PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
endfunction()
